"""Cutting packed bytes equals packing the cut weight: shard(quantize(w)) = quantize(cut(w))."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qwen3_ascend.checkpoint.layout import ND, Cut, Layout
from qwen3_ascend.checkpoint.schemes import SCHEMES, W8A8, Linear
from qwen3_ascend.checkpoint.sharding import max_world, shard
from qwen3_ascend.errors import CheckpointError

PARTS = {"single": (512,), "gate-up": (384, 384), "qkv": (512, 128, 128)}
INPUTS = 128


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def cut_by_hand(tensor: Tensor, cut: Cut, parts: tuple[int, ...], rank: int, world: int) -> Tensor:
    """A rank's piece of a plain weight [N, K] or bias [N]."""
    if cut == "inputs":
        return tensor if tensor.dim() == 1 else tensor.chunk(world, dim=1)[rank]
    pieces = [part.chunk(world)[rank] for part in tensor.split(parts)]
    return torch.cat(pieces)


def layouts(kind: type[Linear]) -> list[Layout]:
    c0 = kind.default_layout().c0
    return [Layout("nz", "KN", c0), Layout("nz", "NK", c0), ND]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("kind", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("cut", ["outputs", "inputs"])
def test_cut_then_quantize_is_quantize_then_cut(
    cut: Cut, kind: type[Linear], bias: bool, parts: tuple[int, ...], world: int
) -> None:
    weight = random(sum(parts), INPUTS)
    offset = random(sum(parts)) if bias else None
    if kind is W8A8 and cut == "inputs":
        weight[:, ::32] = 4.0  # every piece of a row then has the scale of the whole row
        weight.clamp_(-4, 4)
    for layout in layouts(kind):
        whole = kind.quantize(weight, offset, layout)
        for rank in range(world):
            piece = cut_by_hand(weight, cut, parts, rank, world)
            keeps = bias and (cut == "outputs" or rank == 0)
            of_piece = cut_by_hand(offset, cut, parts, rank, world) if keeps else None  # type: ignore[arg-type]
            expected = kind.quantize(piece, of_piece, layout)
            actual = shard(whole, cut, parts, rank, world)
            assert type(actual) is kind
            assert actual.shape == expected.shape and actual.layout == expected.layout
            assert actual.tensors().keys() == expected.tensors().keys()
            for name, tensor in expected.tensors().items():
                assert torch.equal(actual.tensors()[name], tensor), (layout, rank, name)


@pytest.mark.parametrize("kind", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("cut", ["outputs", "inputs"])
def test_ranks_together_compute_the_whole(cut: Cut, kind: type[Linear]) -> None:
    parts = PARTS["qkv"]
    whole = kind.quantize(random(sum(parts), INPUTS), random(sum(parts)), kind.default_layout())
    pieces = [shard(whole, cut, parts, rank, 4).dequantize() for rank in range(4)]
    if cut == "inputs":
        assert torch.equal(torch.cat(pieces, dim=1), whole.dequantize())
        return
    by_part = [piece.split([part // 4 for part in parts]) for piece in pieces]
    rows = [piece[index] for index in range(len(parts)) for piece in by_part]
    assert torch.equal(torch.cat(rows), whole.dequantize())


def test_one_rank_has_it_all() -> None:
    whole = W8A8.quantize(random(64, 64), None, W8A8.default_layout())
    assert shard(whole, "outputs", (64,), 0, 1) is whole


@pytest.mark.parametrize(
    ("cut", "parts", "inputs", "message"),
    [
        ("outputs", (96,), 64, "inside a block of 32"),  # 48 rows are one and a half strips
        ("outputs", (99,), 64, "does not split over 2"),
        ("outputs", (128, 96), 64, "inside a block"),  # the first part alone would do
        ("inputs", (64,), 48, "inside a block of 16"),
        ("inputs", (64,), 63, "does not split over 2"),
    ],
)
def test_uneven_cuts_are_refused(
    cut: Cut, parts: tuple[int, ...], inputs: int, message: str
) -> None:
    whole = W8A8.quantize(random(sum(parts), inputs), None, W8A8.default_layout())
    with pytest.raises(CheckpointError, match=message):
        shard(whole, cut, parts, 0, 2)


@pytest.mark.parametrize("kind", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("cut", ["outputs", "inputs"])
@pytest.mark.parametrize("parts", [(512,), (512, 128, 64), (96, 96), (17,)], ids=str)
def test_max_world_is_what_shard_accepts(
    kind: type[Linear], cut: Cut, parts: tuple[int, ...]
) -> None:
    layout = kind.default_layout()
    whole = kind.quantize(random(sum(parts), INPUTS), None, layout)
    limit = max_world(cut, parts, INPUTS, layout)
    for rank in range(limit):
        shard(whole, cut, parts, rank, limit)
    with pytest.raises(CheckpointError):
        for rank in range(2 * limit):
            shard(whole, cut, parts, rank, 2 * limit)


def test_bias_of_a_row_cut_is_added_once() -> None:
    whole = W8A8.quantize(random(64, 64), random(64), W8A8.default_layout())
    pieces = [shard(whole, "inputs", (64,), rank, 2) for rank in range(2)]
    assert [piece.bias is None for piece in pieces] == [False, True]
    assert torch.equal(pieces[0].bias, whole.bias)  # type: ignore[arg-type]
    assert replace(pieces[0], bias=None).tensors().keys() == pieces[1].tensors().keys()
