"""A conversion from end to end: all source forms give the same bytes, and no weight is believed
that is not a number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_models
from support.command_line import run
from torch import Tensor

from qwen3_ascend import ConvertOptions, Events, convert_checkpoint
from qwen3_ascend.checkpoint.manifest import Manifest
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.checkpoint.verify import verify
from qwen3_ascend.convert.plan import Plan

BIASED = tiny_models.config(attention_bias=True)


def stored(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for shard in sorted(folder.glob("ascend-*.safetensors"))
        for name, tensor in load_file(shard).items()
    }


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("recipe", ["bf16", "w8a8", "w8a8-attention-bf16"])
def test_how_the_source_is_cut_changes_nothing(recipe: str, tmp_path: Path) -> None:
    weights = tiny_models.tensors(BIASED)
    for shards in (1, 2, 5):
        tiny_models.write(tmp_path / f"{shards}", BIASED, weights, shards=shards)
        convert_checkpoint(tmp_path / f"{shards}", tmp_path / f"out{shards}", recipe)
    first = stored(tmp_path / "out1")
    for shards in (2, 5):
        assert_equal(stored(tmp_path / f"out{shards}"), first)
        files = Manifest.read(tmp_path / f"out{shards}").source.files
        assert len(files) == shards


def test_how_the_output_is_cut_changes_nothing(tmp_path: Path) -> None:
    source = tiny_models.write(tmp_path / "source", BIASED)
    convert_checkpoint(source, tmp_path / "one")
    convert_checkpoint(source, tmp_path / "many", options=ConvertOptions(max_file_bytes=1))
    assert len(list((tmp_path / "many").glob("ascend-*"))) > 10
    assert_equal(stored(tmp_path / "many"), stored(tmp_path / "one"))
    assert verify(tmp_path / "many").ok


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("recipe", ["bf16", "w8a8"])
def test_other_source_types(dtype: torch.dtype, recipe: str, tmp_path: Path) -> None:
    """Numbers that both types hold give the same bytes."""
    weights = tiny_models.tensors(BIASED)
    weights = {n: t.half().bfloat16().half().bfloat16() for n, t in weights.items()}
    assert all(torch.equal(t.to(dtype).bfloat16(), t) for t in weights.values())
    tiny_models.write(tmp_path / "bf16", BIASED, weights)
    tiny_models.write(tmp_path / "other", BIASED, {n: t.to(dtype) for n, t in weights.items()})
    convert_checkpoint(tmp_path / "bf16", tmp_path / "a", recipe)
    convert_checkpoint(tmp_path / "other", tmp_path / "b", recipe)
    assert_equal(stored(tmp_path / "b"), stored(tmp_path / "a"))


def test_converting_twice_gives_the_same_files(tmp_path: Path) -> None:
    source = tiny_models.write(tmp_path / "source")
    for name in ("a", "b"):
        convert_checkpoint(source, tmp_path / name)
    files = [{p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("a", "b")]
    assert files[0] == files[1]


def test_the_index_says_which_copy_counts(tmp_path: Path) -> None:
    source = tiny_models.write(tmp_path / "source", shards=2)
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.norm.weight"
    other = next(file for file in set(index.values()) if file != index[name])
    tensors = load_file(source / other)
    save_file({**tensors, name: torch.zeros(64, dtype=torch.bfloat16)}, source / other)
    convert_checkpoint(source, tmp_path / "out", "bf16")
    expected = tiny_models.tensors(tiny_models.config())[name]
    assert torch.equal(CheckpointReader(tmp_path / "out").tensor(name), expected)


def test_progress_adds_up(tmp_path: Path) -> None:
    source = tiny_models.write(tmp_path / "source", BIASED)
    planned, counted = list[int](), list[tuple[str, int]]()

    class Count(Events):
        def planned(self, plan: Plan) -> None:
            planned.append(plan.source_bytes)

        def done(self, name: str, nbytes: int) -> None:
            counted.append((name, nbytes))

    manifest = convert_checkpoint(source, tmp_path / "out", events=Count())
    assert sum(nbytes for _, nbytes in counted) == planned[0]
    assert {name for name, _ in counted} == {*manifest.linears, *manifest.tensors}


PLACES = {
    "linear": ("model.layers.1.mlp.up_proj.weight", (95, 63)),
    "linear, a later block of rows": ("lm_head.weight", (300, 5)),
    "bias": ("model.layers.0.self_attn.v_proj.bias", (3,)),
    "norm": ("model.layers.0.self_attn.q_norm.weight", (31,)),
    "norm of a layer": ("model.layers.1.input_layernorm.weight", (5,)),
    "last norm": ("model.norm.weight", (0,)),
    "embedding": ("model.embed_tokens.weight", (319, 0)),
}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_not_a_number(place: tuple[str, tuple[int, ...]], value: float, tmp_path: Path) -> None:
    name, index = place
    weights = tiny_models.tensors(BIASED)
    weights[name][index] = value
    source = tiny_models.write(tmp_path / "source", BIASED, weights)
    for recipe in ("bf16", "w8a8", "w8a8-plain"):
        done = run("convert", source, tmp_path / "out", "--recipe", recipe)
        done.one_line_error(name, str(list(index)), str(value))
        assert not (tmp_path / "out").exists()


def test_a_number_that_bf16_cannot_hold(tmp_path: Path) -> None:
    """Finite in the source, infinite once rounded."""
    weights = {n: t.float() for n, t in tiny_models.tensors(BIASED).items()}
    weights["model.norm.weight"][7] = 3.4e38
    source = tiny_models.write(tmp_path / "source", BIASED, weights)
    run("convert", source, tmp_path / "out").one_line_error("model.norm.weight", "[7]")
    assert not (tmp_path / "out").exists()


def test_what_the_terminal_says(tmp_path: Path) -> None:
    source = tiny_models.write(tmp_path / "source")
    done = run("convert", source, tmp_path / "out")
    assert done.code == 0 and done.err == ""
    assert "8 of 9 linears are quantized: mean SQNR" in done.out
    assert "1 of 9 linears are rounded to bfloat16: mean SQNR 5" in done.out  # the rotated head
    plain = run("convert", source, tmp_path / "plain", "--recipe", "w8a8-plain")
    assert "8 of 9 linears are quantized" in plain.out
    assert "1 of 9 linears equal their source exactly" in plain.out
    shown = run("inspect", tmp_path / "out")
    for name in Manifest.read(tmp_path / "out").linears:
        assert name in shown.out
