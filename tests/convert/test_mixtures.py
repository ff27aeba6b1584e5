"""Mixtures of experts: their names in both spellings, what is stored of them, and cuts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_models
from support.command_line import run
from support.quantized_sources import (
    source_weights,
    write_ascendv1,
    write_compressed_tensors,
    write_fp8,
    write_packed,
)

from qwen3_ascend import Recipe, convert_checkpoint
from qwen3_ascend.checkpoint.linear import quantize
from qwen3_ascend.checkpoint.manifest import Manifest
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.checkpoint.schemes import SCHEMES, W4A8, W4A16, W8A8, W8A16, Scheme, W8A8Static
from qwen3_ascend.checkpoint.sharding import shard, shard_experts
from qwen3_ascend.checkpoint.target import ASCEND_A2_A3
from qwen3_ascend.convert.plan import Plan, make_plan
from qwen3_ascend.convert.source.config_file import read_config
from qwen3_ascend.errors import CheckpointError, RecipeError, UserError
from qwen3_ascend.files.safetensors import TensorSlot

Write = Callable[[Path, dict[str, Any]], Path]

A3B = tiny_models.mixture(
    hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_experts=128,
    num_experts_per_tok=8, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4,
    head_dim=128, vocab_size=151936, max_position_embeddings=40960,
)  # fmt: skip
A22B = A3B | {
    "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536,
    "num_hidden_layers": 94, "num_attention_heads": 64,
}  # fmt: skip
"""As config.json on the Hub has them."""


def plan(data: dict[str, Any], recipe: str) -> Plan:
    slots, at = {}, 0
    for name, shape in tiny_models.shapes(data).items():
        stop = at + 2 * torch.Size(shape).numel()
        slots[name] = TensorSlot(torch.bfloat16, shape, at, stop)
        at = stop
    return make_plan(read_config(data), slots, Recipe.load(recipe))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write(tmp_path_factory.mktemp("mixture"), tiny_models.mixture(), shards=3)


@pytest.mark.parametrize(
    ("data", "parameters"), [(A3B, 30_532_122_624), (A22B, 235_093_634_560)], ids=["30B", "235B"]
)
def test_published_models(data: dict[str, Any], parameters: int) -> None:
    """The parameter counts are those of the models on the Hub."""
    made = plan(data, "moe-w8a8")
    assert made.parameters == parameters
    assert made.source_bytes == 2 * parameters
    assert 8.0 < made.bits_per_weight < 8.4
    schemes = {item.name.rpartition(".")[2]: item.scheme.name for item in made.items}
    assert schemes["gate_up_proj"] == schemes["down_proj"] == schemes["qkv_proj"] == "w8a8"
    assert schemes["lm_head"] == "bf16"


@pytest.mark.parametrize("recipe", ["bf16", "w8a8-plain", "moe-w8a8", "moe-w8a8-experts"])
def test_both_spellings_become_the_same_bytes(source: Path, tmp_path: Path, recipe: str) -> None:
    data = tiny_models.mixture()
    weights = tiny_models.fused(tiny_models.tensors(data))
    assert "model.layers.0.mlp.experts.gate_up_proj" in weights
    fused = tiny_models.write(tmp_path / "fused", data, weights)
    for name, folder in (("apart", source), ("together", fused)):
        convert_checkpoint(folder, tmp_path / name, recipe)
        assert run("verify", tmp_path / name, "--against", folder).code == 0
    apart, together = (Manifest.read(tmp_path / name) for name in ("apart", "together"))
    assert {n: t.blake3 for n, t in apart.stored().items()} == {
        n: t.blake3 for n, t in together.stored().items()
    }


EVERY_SCHEME = {
    "w8a8": W8A8(),
    "w8a16": W8A16(),
    "w4a16": W4A16(64),
    "w4a16-zero-points": W4A16(32, zero_points=True),
    "w4a8": W4A8(),
}
WIDE = tiny_models.mixture(hidden_size=256, moe_intermediate_size=256)
"""In shapes that all of them take."""


def recipe(scheme: Scheme, quantizer: str = "nearest") -> Recipe:
    rule = {"match": "*.mlp.experts.*", "scheme": scheme.to_json(), "quantizer": quantizer}
    rules = [rule, {"match": "*", "scheme": "bf16"}]
    return Recipe.parse(json.dumps({"schema": 1, "name": "mine", "rules": rules}), "mine")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write(tmp_path_factory.mktemp("wide"), WIDE)


@pytest.mark.parametrize("scheme", EVERY_SCHEME.values(), ids=EVERY_SCHEME)
def test_every_expert_is_what_it_would_be_by_itself(
    scheme: Scheme, wide: Path, tmp_path: Path
) -> None:
    convert_checkpoint(wide, tmp_path / "out", recipe(scheme))
    assert run("verify", tmp_path / "out", "--against", wide).code == 0
    reader, weights = CheckpointReader(tmp_path / "out"), tiny_models.tensors(WIDE)
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        for expert in range(4):
            pair = [weights[f"{prefix}.{expert}.{n}.weight"] for n in ("gate_proj", "up_proj")]
            down = weights[f"{prefix}.{expert}.down_proj.weight"]
            for name, weight in (("gate_up_proj", torch.cat(pair)), ("down_proj", down)):
                layout = ASCEND_A2_A3.layout(scheme, name, (4, *weight.shape))
                expected = quantize(scheme, weight, None, layout)
                stored = reader.linear(f"{prefix}.{name}").matrix(expert)
                for suffix, tensor in expected.tensors.items():
                    assert torch.equal(stored.tensors[suffix], tensor)


def test_the_router_is_kept_as_it_is(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, tmp_path / "out", "w8a8-plain")
    reader, name = CheckpointReader(tmp_path / "out"), "model.layers.1.mlp.gate.weight"
    assert torch.equal(reader.tensor(name), tiny_models.tensors(tiny_models.mixture())[name])


def test_experts_of_a_rank_are_one_range_of_bytes(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, tmp_path / "out", "w8a8-plain")
    linear = CheckpointReader(tmp_path / "out").linear("model.layers.0.mlp.experts.gate_up_proj")
    for rank in range(2):
        part = shard_experts(linear, rank, 2)
        assert part.shape == (2, 96, 64)
        for suffix, tensor in part.tensors.items():
            whole = linear.tensors[suffix]
            at = rank * whole.nbytes // 2
            assert tensor.is_contiguous() and tensor.data_ptr() == whole.data_ptr() + at
        again = [part.matrix(expert).dequantize() for expert in range(2)]
        first = linear.dequantize()[2 * rank : 2 * rank + 2]
        assert torch.equal(torch.stack(again), first)
    with pytest.raises(CheckpointError, match="does not split"):
        shard_experts(linear, 0, 3)


def test_experts_are_cut_along_their_inner_dimension_too(tmp_path: Path) -> None:
    weight = torch.randn(3, 256, 64)
    scheme = SCHEMES["w8a8"]()
    layout = ASCEND_A2_A3.layout(scheme, "", weight.shape)
    linear = quantize(scheme, weight, None, layout)
    rows = torch.cat([weight[:, 64:128], weight[:, 192:]], 1)
    expected = quantize(scheme, rows, None, layout)
    part = shard(linear, "outputs", [128, 128], 1, 2)
    for suffix, tensor in expected.tensors.items():
        assert torch.equal(part.tensors[suffix], tensor)


def test_errors_of_experts_are_reported(tmp_path: Path) -> None:
    """One expert is much worse than the others: a few of its weights are huge."""
    data = tiny_models.mixture()
    weights = tiny_models.tensors(data)
    weights["model.layers.1.mlp.experts.2.down_proj.weight"][:, 0] *= 400
    source = tiny_models.write(tmp_path / "source", data, weights)
    done = run("convert", source, tmp_path / "out", "--recipe", "w8a8-plain")
    assert done.code == 0
    assert "number 2 of model.layers.1.mlp.experts.down_proj" in done.out + done.err
    entry = Manifest.read(tmp_path / "out").linears["model.layers.1.mlp.experts.down_proj"]
    figures = entry.experts_sqnr_db
    assert len(figures) == 4 and min(f for f in figures if f) == figures[2]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (W4A16(128), "npu_grouped_matmul wants a multiple of 128 inputs of w4a16"),
        (W4A8(), "npu_grouped_matmul wants a multiple of 256 inputs of w4a8"),
        (W8A8Static(), "experts can only have the schemes bf16, w8a8, w8a16, w4a8, w4a16"),
        ("w8a8-calibrated", "smooth and awq move factors between the linears of one MLP"),
    ],
    ids=str,
)
def test_what_experts_cannot_have_is_refused(
    source: Path, tmp_path: Path, asked: Scheme | str, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        made = asked if isinstance(asked, str) else recipe(asked)
        convert_checkpoint(source, tmp_path / "out", made)
    assert not (tmp_path / "out").exists()


def test_recipes_of_experts_are_for_models_that_have_some(
    tiny_source: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"experts.*decides nothing"):
        convert_checkpoint(tiny_source, tmp_path / "out", "moe-w8a8")


def test_a_fused_tensor_of_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    data = tiny_models.mixture()
    weights = tiny_models.fused(tiny_models.tensors(data))
    source = tiny_models.write(tmp_path / "source", data | {"num_experts": 5}, weights)
    with pytest.raises(UserError, match=r"_proj is \[4, .*5 experts"):
        convert_checkpoint(source, tmp_path / "out", "bf16")


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    data = tiny_models.mixture()
    weights = tiny_models.tensors(data)
    del weights["model.layers.1.mlp.experts.3.up_proj.weight"]
    source = tiny_models.write(tmp_path / "source", data, weights)
    with pytest.raises(UserError, match=r"no tensor model\.layers\.1\.mlp\.experts\.3\.up_proj"):
        convert_checkpoint(source, tmp_path / "out", "bf16")


def test_a_value_that_is_no_number_is_named_in_its_expert(tmp_path: Path) -> None:
    data = tiny_models.mixture()
    weights = tiny_models.tensors(data)
    weights["model.layers.0.mlp.experts.1.gate_proj.weight"][3, 5] = torch.nan
    source = tiny_models.write(tmp_path / "source", data, weights)
    with pytest.raises(UserError, match=r"experts\.1\.gate_proj\.weight holds nan at \[3, 5\]"):
        convert_checkpoint(source, tmp_path / "out", "w8a8-plain")


@pytest.mark.parametrize("write", [write_fp8, write_compressed_tensors, write_ascendv1])
def test_sources_that_are_quantized_already(write: Write, tmp_path: Path) -> None:
    """FP8 is decoded; int8 codes of every expert are taken as they are."""
    data = tiny_models.mixture(hidden_size=128, moe_intermediate_size=128)
    source = write(tmp_path / "source", data)
    manifest = convert_checkpoint(source, tmp_path / "out")
    assert run("verify", tmp_path / "out", "--against", source).code == 0
    name = "model.layers.1.mlp.experts.down_proj"
    decoded = write is write_fp8
    assert manifest.linears[name].codes == ("chosen" if decoded else "taken")
    if not decoded:
        held, reader = source_weights(source), CheckpointReader(tmp_path / "out")
        for expert in range(4):
            codes = held[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"]
            assert torch.equal(reader.linear(name).matrix(expert).codes()["weight"], codes)


def test_int4_of_a_source_is_kept(tmp_path: Path) -> None:
    source = write_packed(tmp_path / "source", tiny_models.mixture(moe_intermediate_size=64))
    manifest = convert_checkpoint(source, tmp_path / "out")
    entry = manifest.linears["model.layers.1.mlp.experts.down_proj"]
    assert isinstance(entry.scheme, W4A16) and entry.codes == "taken"
    assert run("verify", tmp_path / "out", "--against", source).code == 0


def test_sensitivities_are_not_measured_yet(source: Path, tmp_path: Path) -> None:
    bits = run("sensitivity", source, tmp_path / "bits.json", "--recipe", "w8a8-plain")
    bits.one_line_error("what single experts lose is not measured yet")
    assert not (tmp_path / "bits.json").exists()
