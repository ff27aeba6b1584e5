"""Conversions to schemes that fix beforehand how inputs are quantized, and to int4 in groups."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import tiny_models
from support.command_line import run
from support.folders import finished_weights
from support.static_inputs import write_static

from qwen3_ascend import ConvertOptions, SamplingParams, convert_checkpoint, load
from qwen3_ascend.checkpoint.linear import quantize
from qwen3_ascend.checkpoint.manifest import Manifest
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.checkpoint.schemes import W4A8, W8A8Static, pieces
from qwen3_ascend.checkpoint.schemes.w8a8_static import static_input
from qwen3_ascend.checkpoint.target import ASCEND_A2_A3
from qwen3_ascend.checkpoint.verify import verify
from qwen3_ascend.convert import export_checkpoint
from qwen3_ascend.errors import OptionError, RecipeError

DATA = tiny_models.DATA


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model, calibrated; not to be changed."""
    out = tmp_path_factory.mktemp("static") / "out"
    write_static(DATA, out)
    return out


@pytest.mark.parametrize("small", [False, True])
def test_what_is_stored(small: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the pieces: what belongs to all outputs together is written once."""
    if small:
        monkeypatch.setattr(pieces, "PIECE_BYTES", 2048)
    data = tiny_models.config(attention_bias=True)
    weights = tiny_models.tensors(data)
    source = tiny_models.write(tmp_path / "source", data, weights, tokenizer=False)
    write_static(source, tmp_path / "out", tokens=64)
    assert verify(tmp_path / "out").ok
    reader = CheckpointReader(tmp_path / "out")
    scales = set()
    for name, entry in reader.manifest.linears.items():
        linear, parts = reader.linear(name), [part for part, _ in entry.parts]
        if entry.scheme != W8A8Static():
            continue
        whole = torch.cat([weights[f"{part}.weight"] for part in parts])
        made = quantize(W8A8Static(), whole, None, ASCEND_A2_A3.layouts["w8a8-static"])
        held, codes = linear.codes(), made.codes()
        assert torch.equal(held["weight"], codes["weight"])
        scale, offset = held["input_scale"], held["input_offset"].int()
        reciprocal = (1 / scale).bfloat16().float()
        assert torch.equal(held["deq_scale"], codes["deq_scale"] / reciprocal)
        assert torch.equal(held["quant_bias"], -offset * codes["weight"].int().sum(1))
        assert held["quant_bias"].any() and (linear.bias is None) != ("attn" in name)
        scales.add(float(scale))
    assert len(scales) == 8  # each linear has a range of its own


def test_ranges_are_those_of_the_inputs(static: Path, tiny_bf16: Path) -> None:
    """The first linear's, found another way: norms of embedded calibration tokens."""
    reader = CheckpointReader(tiny_bf16)
    table = reader.tensor("model.embed_tokens.weight").float()
    weight = reader.tensor("model.layers.0.input_layernorm.weight").float()
    normed = table * torch.rsqrt(table.square().mean(-1, keepdim=True) + 1e-6) * weight
    linear = CheckpointReader(static).linear("model.layers.0.self_attn.qkv_proj")
    made = static_input(linear.tensors)
    steps = torch.tensor([-128 - made.offset, 127 - made.offset]) / made.reciprocal
    assert normed.min() * 1.01 <= steps[0] <= normed.min() / 4
    assert normed.max() / 4 <= steps[1] <= normed.max() * 1.01


def test_errors_are_measured_again(static: Path) -> None:
    done = run("verify", static, "--against", DATA)
    assert done.code == 0, done.err
    manifest, plain = Manifest.read(static), run("inspect", static)
    assert "w8a8-static" in plain.out
    assert all(
        entry.sqnr_db is not None and entry.sqnr_db > 35
        for entry in manifest.linears.values()
        if entry.scheme.name == "w8a8-static"
    )


def test_the_trained_model_still_answers(static: Path, tiny_bf16: Path) -> None:
    params = SamplingParams(max_new_tokens=12)
    prompts = [f"What does {word} mean?" for word in ("river", "bicycle", "house", "music")]
    answers = [
        [answer.token_ids for answer in load(folder, "cpu").generate(prompts, params)]
        for folder in (static, tiny_bf16)
    ]
    assert answers[0] == answers[1]


def test_int4_of_the_trained_model(tmp_path: Path) -> None:
    manifest = convert_checkpoint(DATA, tmp_path / "out", "w4a8-plain")
    assert verify(tmp_path / "out").ok
    assert run("verify", tmp_path / "out", "--against", DATA).code == 0
    entries = [each for each in manifest.linears.values() if each.scheme == W4A8()]
    assert len(entries) == 4 * manifest.model.num_layers
    for entry in entries:
        outputs, inputs = entry.shape
        assert entry.tensors["weight"].shape == (inputs, outputs // 8)
        nbytes = sum(tensor.nbytes for tensor in entry.tensors.values())
        assert 8 * nbytes / (outputs * inputs) == 4 + (32 + 16) / 256
    answers = load(tmp_path / "out", "cpu").generate(
        ["What does river mean?"], SamplingParams(max_new_tokens=12)
    )
    assert answers[0].text.startswith("As a noun, river means:")


def test_int4_in_small_pieces_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert_checkpoint(DATA, tmp_path / "whole", "w4a8-plain")
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1)
    convert_checkpoint(DATA, tmp_path / "pieces", "w4a8-plain", ConvertOptions(threads=2))
    assert finished_weights(tmp_path / "whole") == finished_weights(tmp_path / "pieces")


def test_a_model_of_other_sizes_is_refused_for_int4(tmp_path: Path) -> None:
    source = tiny_models.write(tmp_path / "source")
    rule = r"qkv_proj: it is \[256, 64\], but npu_quant_matmul wants a multiple of 256 inputs"
    with pytest.raises(RecipeError, match=rule):
        convert_checkpoint(source, tmp_path / "out", "w4a8-plain")


@pytest.mark.parametrize("format", ["ascendv1", "compressed-tensors"])
def test_int4_is_refused_by_name(format: str, tmp_path: Path) -> None:
    convert_checkpoint(DATA, tmp_path / "out", "w4a8-plain")
    with pytest.raises(OptionError, match=f"{format} cannot state .*, which has the scheme w4a8"):
        export_checkpoint(tmp_path / "out", tmp_path / "to", format)
