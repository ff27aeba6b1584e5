"""Which part of a stored linear a rank of an engine gets, against cuts of the plain weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny_models import DATA, config, mixture, write
from torch import Tensor

from qwen3_ascend import OptionError, convert_checkpoint
from qwen3_ascend.checkpoint.linear import Linear, quantize
from qwen3_ascend.checkpoint.manifest import LinearEntry, Manifest
from qwen3_ascend.checkpoint.schemes import BF16, W4A16, W8A8, W8A16, Scheme, W8A8Static
from qwen3_ascend.checkpoint.target import ASCEND_A2_A3
from qwen3_ascend.errors import CheckpointError
from qwen3_ascend.vllm.shards import Rank, Rows, check_division, rows_of, shard_of

SCHEMES: list[Scheme] = [
    BF16(), W8A8(), W8A16(), W4A16(32), W4A16(32, zero_points=True), W8A8Static()
]  # fmt: skip
HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 8, 2, 32, 64


def stored(scheme: Scheme, weight: Tensor, bias: Tensor | None = None) -> Linear:
    return quantize(scheme, weight, bias, ASCEND_A2_A3.layout(scheme, "", weight.shape))


def entry(linear: Linear, parts: tuple[int, ...]) -> LinearEntry:
    named = tuple((str(number), outputs) for number, outputs in enumerate(parts))
    return LinearEntry(linear.scheme, linear.shape, named, "outputs", linear.layout, None, {})


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize(("world", "copies"), [(1, 1), (2, 1), (4, 2), (8, 4)])
def test_ranks_beyond_the_key_value_heads_share_them(
    scheme: Scheme, world: int, copies: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM)
    weight = torch.randn(sum(parts), HIDDEN, generator=generator).bfloat16()
    bias = torch.randn(sum(parts), generator=generator).bfloat16()
    whole = stored(scheme, weight, bias)
    for number in range(world):
        shard = shard_of(whole, entry(whole, parts), Rank(number, world, copies))
        head = number // copies if copies > 1 else number  # of keys and values, when cut by heads
        pieces = [
            part.chunk(world if first else world // copies)[number if first else head]
            for first, part in zip((True, False, False), weight.split(parts), strict=True)
        ]
        expected = stored(scheme, torch.cat(pieces))
        assert shard.shape == expected.shape
        for suffix, tensor in expected.tensors.items():
            assert torch.equal(shard.tensors[suffix], tensor), (number, suffix)
        assert shard.bias is not None and shard.bias.shape == (expected.shape[0],)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize(
    ("start", "count", "kept"), [(0, 64, 64), (64, 64, 64), (128, 32, 64), (128, 20, 64)]
)
def test_rows_of_a_vocabulary_are_padded_with_zeros(
    scheme: Scheme, start: int, count: int, kept: int
) -> None:
    weight = torch.randn(start + count, HIDDEN, generator=torch.Generator().manual_seed(0))
    part = rows_of(stored(scheme, weight.bfloat16()), Rows(start, count, kept))
    assert part.shape == (kept, HIDDEN)
    expected = stored(scheme, weight.bfloat16()[start:]).dequantize()
    assert torch.equal(part.dequantize()[:count], expected)
    assert not part.dequantize()[count:].any()


def test_rows_within_a_block_are_refused() -> None:
    whole = stored(W8A8(), torch.randn(64, HIDDEN).bfloat16())
    with pytest.raises(CheckpointError, match="inside a block of 32 of the weight"):
        rows_of(whole, Rows(16, 32, 32))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return convert_checkpoint(DATA, tmp_path_factory.mktemp("out") / "tiny")


@pytest.mark.parametrize("world", [1, 2, 4])
def test_sizes_of_groups_that_divide_the_heads(manifest: Manifest, world: int) -> None:
    check_division(manifest, world)


@pytest.mark.parametrize("world", [3, 5, 8])
def test_sizes_of_groups_that_do_not(manifest: Manifest, world: int) -> None:
    expected = (
        f"--tensor-parallel-size {world} does not divide the 4 query heads and 2 key/value heads "
        f"of this model; choose 1, 2 or 4"
    )
    with pytest.raises(OptionError, match=expected):
        check_division(manifest, world)


def test_ranks_of_experts(tmp_path: Path) -> None:
    """A rank has whole strips of 32 codes of every expert."""
    source = write(tmp_path / "source", mixture(moe_intermediate_size=64))
    manifest = convert_checkpoint(source, tmp_path / "out")
    check_division(manifest, 2, ASCEND_A2_A3)
    named = "4: model.layers.0.mlp.experts.gate_up_proj: a cut at 48.16 falls inside a block of 32"
    with pytest.raises(OptionError, match=named):
        check_division(manifest, 4, ASCEND_A2_A3)


def test_inputs_that_do_not_divide_are_named(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write(source, config(intermediate_size=96 + 16))
    made = convert_checkpoint(source, tmp_path / "out")
    with pytest.raises(OptionError, match=r"--tensor-parallel-size 4: model\.layers\.0\.mlp\."):
        check_division(made, 4)


def test_parts_that_are_no_groups_or_one(tmp_path: Path) -> None:
    """In groups of 128, a quarter of the 768 inputs of down_proj is one and a half. A quarter of
    the 512 of o_proj is one, which npu_weight_quant_batchmatmul does not take."""
    manifest = convert_checkpoint(DATA, tmp_path / "out", "w4a16-plain")
    check_division(manifest, 2, ASCEND_A2_A3)
    within = "4: model.layers.0.mlp.down_proj: a cut at 576.192 falls inside a block of 128"
    with pytest.raises(OptionError, match=within):
        check_division(manifest, 4)
    one = (
        r"--tensor-parallel-size 4: a part of model.layers.0.self_attn.o_proj: it is "
        r"\[256, 128\], but npu_weight_quant_batchmatmul wants more inputs than a group of 128"
    )
    with pytest.raises(OptionError, match=one):
        check_division(manifest, 4, ASCEND_A2_A3)
