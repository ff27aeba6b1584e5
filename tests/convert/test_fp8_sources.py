"""Sources in FP8: decoded as transformers decodes them, under any recipe."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize
from safetensors.torch import load_file, save_file
from support import tiny_models
from support.command_line import run
from support.folders import contents, finished_weights
from support.hub_client import REPO, talk_to
from support.hub_server import HubServer
from support.quantized_sources import (
    DATA,
    FP8_SECTION,
    fp8_weights,
    section,
    source_weights,
    write_compressed_tensors,
    write_fp8,
)
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.quantizers import quantizer_finegrained_fp8

from qwen3_ascend import ConvertOptions, convert_checkpoint
from qwen3_ascend.checkpoint.manifest import Manifest
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.checkpoint.schemes import BF16, W8A8, pieces
from qwen3_ascend.convert.decoded import ScaledBlocks

BLOCKS = tiny_models.config(
    hidden_size=256, intermediate_size=384, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=4,
)  # fmt: skip
"""Whole blocks of 128 x 128: transformers reads no others."""

EDGES = tiny_models.config(
    hidden_size=144, intermediate_size=150, num_attention_heads=5, num_hidden_layers=1,
    num_key_value_heads=1, head_dim=28, attention_bias=True,
)  # fmt: skip
"""Blocks that are cut off at both edges; 140 outputs for queries and 28 for keys."""

REAL = ("llm-compressor-fp8-dynamic", "llm-compressor-fp8-block")

DOWN = "model.layers.0.mlp.down_proj"


def loaded_by_transformers(source: Path) -> dict[str, Tensor]:
    """The weights that transformers makes of a source, in bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(str(source), dtype=torch.bfloat16)
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def assert_stored(out: Path, expected: Mapping[str, Tensor]) -> None:
    """A checkpoint in bf16 holds these weights, bit by bit."""
    reader = CheckpointReader(out)
    for name, entry in reader.manifest.linears.items():
        stacked = torch.cat([expected[f"{part}.weight"] for part, _ in entry.parts])
        assert entry.scheme == BF16() and entry.sqnr_db is None
        found = reader.linear(name).codes()["weight"]
        assert torch.equal(found.view(torch.int16), stacked.view(torch.int16)), name
    for name in reader.manifest.tensors:
        assert torch.equal(reader.tensor(name), expected[name])


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16])
def test_the_floats_are_those_of_transformers(
    scales: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It decodes where there is no GPU; accelerate, which it asks for, has no part in that."""
    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: True)
    weights = fp8_weights(tiny_models.tensors(BLOCKS), [DOWN], scales)
    said = {**FP8_SECTION, "modules_to_not_convert": ["lm_head", DOWN]}
    source = write_fp8(tmp_path / "source", BLOCKS, weights, said=said)
    convert_checkpoint(source, tmp_path / "out", "bf16")
    assert_stored(tmp_path / "out", loaded_by_transformers(source))


@pytest.mark.parametrize("name", REAL)
def test_what_llm_compressor_has_written(name: str, tmp_path: Path) -> None:
    """Held against the package that it writes with. One has a scale for each output, the other for
    blocks that the edges cut off."""
    convert_checkpoint(DATA / name, tmp_path / "out", "bf16")
    said = json.loads((DATA / name / "config.json").read_text())["quantization_config"]
    arguments = QuantizationArgs(**said["config_groups"]["group_0"]["weights"])
    weights = source_weights(DATA / name)
    expected = {
        name: dequantize(tensor, weights[f"{name}_scale"], args=arguments)
        if f"{name}_scale" in weights
        else tensor
        for name, tensor in weights.items()
    }
    assert_stored(tmp_path / "out", expected)
    assert Manifest.read(tmp_path / "out").source.format == "compressed-tensors"


def decoded(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The floats of FP8 weights, element by element."""
    found = {}
    for name, tensor in weights.items():
        if f"{name}_scale_inv" in weights:
            scales = weights[f"{name}_scale_inv"].float()
            row, column = torch.meshgrid(*map(torch.arange, tensor.shape), indexing="ij")
            floats = tensor.float() * scales[row // 128, column // 128]
            found[name] = floats.bfloat16()
        elif not name.endswith("_scale_inv"):
            found[name] = tensor
    return found


@pytest.mark.parametrize("data", [BLOCKS, EDGES], ids=["blocks", "edges"])
@pytest.mark.parametrize("recipe", [None, "w8a8-head", "w8a8-attention-bf16", "bf16"])
def test_a_recipe_makes_of_it_what_it_makes_of_the_floats(
    recipe: str | None, data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces that begin and end within blocks."""
    weights = fp8_weights(tiny_models.tensors(data))
    source = write_fp8(tmp_path / "source", data, weights)
    floats = tiny_models.write(tmp_path / "floats", data, decoded(weights))
    convert_checkpoint(floats, tmp_path / "expected", recipe)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 3000)
    manifest = convert_checkpoint(source, tmp_path / "out", recipe)
    assert finished_weights(tmp_path / "out") == finished_weights(tmp_path / "expected")
    expected = Manifest.read(tmp_path / "expected")
    assert manifest.recipe["name"] == (recipe or "w8a8") == expected.recipe["name"]
    assert {n: e.sqnr_db for n, e in manifest.linears.items()} == {
        n: e.sqnr_db for n, e in expected.linears.items()
    }
    assert {e.codes for e in manifest.linears.values()} == {"chosen"}
    done = run("verify", tmp_path / "out", "--against", source)
    assert (done.code, done.err) == (0, "")


def test_ranges_of_a_matrix() -> None:
    codes = torch.randn(40, 30).to(torch.float8_e4m3fn)
    matrix = ScaledBlocks(codes, torch.rand(5, 4), (8, 9))
    row, column = torch.arange(40)[:, None] // 8, torch.arange(30) // 9
    whole = (codes.float() * matrix.scales[row, column]).bfloat16()
    assert torch.equal(matrix.float(), whole.float())
    assert torch.equal(matrix[3:21], whole[3:21]) and torch.equal(matrix[35:99], whole[35:])
    assert torch.equal(matrix[:, 7:19], whole[:, 7:19])
    assert (matrix.shape, matrix.dtype) == ((40, 30), torch.bfloat16)


def test_what_is_said(tmp_path: Path) -> None:
    source, out = write_fp8(tmp_path / "source"), tmp_path / "out"
    plan = run("convert", source, out, "--dry-run")
    assert plan.code == 0 and "taken" not in plan.out and not out.exists()
    manifest = convert_checkpoint(source, out)
    assert manifest.source.format == "fp8" and manifest.linears[DOWN].scheme == W8A8()
    assert "quantized already (fp8), recipe w8a8" in run("inspect", out).out
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    done = run("convert", source, out)
    assert done.code == 0 and "nothing to do" in done.err


def test_from_a_hub(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_fp8(tmp_path / "source")
    hub.add_model(REPO, source)
    talk_to(hub, tmp_path / "cache", monkeypatch)
    convert_checkpoint(REPO, tmp_path / "out", options=ConvertOptions(low_disk=True))
    convert_checkpoint(source, tmp_path / "local", options=ConvertOptions(threads=1))
    assert finished_weights(tmp_path / "out") == finished_weights(tmp_path / "local")


def test_an_interrupted_conversion(tmp_path: Path) -> None:
    """It continues to the same bytes, unless the blocks are said to be others."""
    source, out = write_fp8(tmp_path / "source", EDGES), tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qwen3_ascend.convert.pipeline.Conversion.release", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(source, out, options=ConvertOptions(threads=1))
    path = source / "config.json"
    as_it_was = path.read_text()
    path.write_text(as_it_was.replace("[128, 128]", "[127, 128]"))
    run("convert", source, out, "-q").one_line_error("codes of the source")
    path.write_text(as_it_was)
    convert_checkpoint(source, out, options=ConvertOptions(threads=1))
    convert_checkpoint(source, tmp_path / "at once", options=ConvertOptions(threads=1))
    assert contents(out) == contents(tmp_path / "at once")


def interrupt(*arguments: object) -> None:
    raise KeyboardInterrupt


# What cannot be right.

UP = "model.layers.1.mlp.up_proj"

SECTIONS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no blocks": ({"weight_block_size": None}, ["weight_block_size", "original"]),
    "one side": ({"weight_block_size": [128]}, ["weight_block_size"]),
    "nothing in a block": ({"weight_block_size": [128, 0]}, ["weight_block_size"]),
    "static": ({"activation_scheme": "static"}, ["activation_scheme is 'static'"]),
    "another type": ({"fmt": "e5m2"}, ["fmt is 'e5m2'"]),
    "scales in a byte": ({"scale_fmt": "ue8m0"}, ["scale_fmt is 'ue8m0'"]),
}


@pytest.mark.parametrize(("change", "mentions"), SECTIONS.values(), ids=SECTIONS)
def test_sections(change: dict[str, Any], mentions: list[str], tmp_path: Path) -> None:
    source = write_fp8(tmp_path / "source", said={**FP8_SECTION, **change})
    done = run("convert", source, tmp_path / "out")
    done.one_line_error("config.json: quantization_config", *mentions)
    assert not (tmp_path / "out").exists()


HEADERS: dict[str, tuple[dict[str, Tensor | None], list[str]]] = {
    "no scale": ({f"{UP}.weight_scale_inv": None}, [f"no tensor {UP}.weight_scale_inv", "fp8"]),
    "no codes": ({f"{UP}.weight": torch.ones(96, 64)}, [f"{UP}.weight is F32", "not F8_E4M3"]),
    "other blocks": (
        {f"{UP}.weight_scale_inv": torch.ones(2, 1)}, ["[2, 1]", "[1, 1]", "128 x 128"]
    ),
    "scales of integers": ({f"{UP}.weight_scale_inv": torch.ones(1, 1).int()}, ["I32", "BF16"]),
    "static": ({f"{UP}.activation_scale": torch.ones(1)}, [f"{UP}.activation_scale"]),
    "floats beside codes": (
        {f"{UP}.weight_scale_inv": None, f"{UP}.weight": torch.ones(96, 64)},
        ["model.layers.1.mlp.gate_up_proj", "up_proj: floats", "gate_proj: fp8"],
    ),
}  # fmt: skip


def rewritten(source: Path, changes: Mapping[str, Tensor | None]) -> None:
    found = {**source_weights(source), **changes}
    save_file({n: t for n, t in found.items() if t is not None}, source / "model.safetensors")


@pytest.mark.parametrize(("changes", "mentions"), HEADERS.values(), ids=HEADERS)
def test_headers(changes: dict[str, Tensor | None], mentions: list[str], tmp_path: Path) -> None:
    source = write_fp8(tmp_path / "source")
    rewritten(source, changes)
    for options in ((), ("--dry-run",)):
        run("convert", source, tmp_path / "out", *options).one_line_error(*mentions)
        assert not (tmp_path / "out").exists()


VALUES: dict[str, tuple[str, Callable[[Tensor], Any], list[str]]] = {
    "a code": (f"{UP}.weight", lambda t: t.view(torch.uint8)[7, 3].fill_(0x7F),
               ["holds nan at [7, 3]", "damaged"]),
    "a scale of zero": (f"{UP}.weight_scale_inv", lambda t: t[0, 0].fill_(0.0),
                        ["holds 0.0 at [0, 0]", "no scale is that"]),
    "a negative scale": (f"{UP}.weight_scale_inv", lambda t: t[0, 0].fill_(-1.0), ["holds -1.0"]),
    "no number": (f"{UP}.weight_scale_inv", lambda t: t[0, 0].fill_(float("nan")), ["holds nan"]),
    "a large scale": (f"{UP}.weight_scale_inv", lambda t: t[0, 0].fill_(1e37),
                      ["at [0, 0]", "beyond bfloat16"]),
}  # fmt: skip


@pytest.mark.parametrize("recipe", ["w8a8", "bf16"])
@pytest.mark.parametrize(("name", "change", "mentions"), VALUES.values(), ids=VALUES)
def test_values(
    name: str, change: Callable[[Tensor], Any], mentions: list[str], recipe: str, tmp_path: Path
) -> None:
    source = write_fp8(tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    change(weights[name])
    rewritten(source, weights)
    done = run("convert", source, tmp_path / "out", "-q", "--recipe", recipe)
    done.one_line_error(f"tensor {name}", *mentions)
    assert not (tmp_path / "out").exists()


FLOAT_WEIGHTS = {"type": "float", "strategy": "block", "block_structure": [128, 128]}

COMPRESSED: dict[str, tuple[dict[str, Any], dict[str, Any] | None, list[str]]] = {
    "no blocks": ({**FLOAT_WEIGHTS, "block_structure": None}, None, ["block_structure"]),
    "groups": (
        {"type": "float", "strategy": "group", "group_size": 32},
        None,
        ["strategy is 'group'"],
    ),
    "four bits": ({"type": "float", "num_bits": 4}, None, ["num_bits is 4"]),
    "asymmetric": ({**FLOAT_WEIGHTS, "symmetric": False}, None, ["symmetric is False"]),
    "static": (FLOAT_WEIGHTS, {"dynamic": False}, ["input_activations: dynamic is False"]),
}


@pytest.mark.parametrize(("weights", "inputs", "mentions"), COMPRESSED.values(), ids=COMPRESSED)
def test_sections_of_compressed_tensors(
    weights: dict[str, Any], inputs: dict[str, Any] | None, mentions: list[str], tmp_path: Path
) -> None:
    said = section(weights, inputs, format="float-quantized")
    said["config_groups"]["group_0"]["format"] = "float-quantized"
    source = write_compressed_tensors(tmp_path / "source", said=said)
    done = run("convert", source, tmp_path / "out")
    done.one_line_error("quantization_config: group_0", *mentions)
