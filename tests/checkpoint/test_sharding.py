"""Cutting packed bytes equals packing the cut weight: shard(quantize(w)) = quantize(cut(w))."""

from __future__ import annotations

import pytest
import torch
from support.group_scheme import LAYOUTS, GroupInt4
from torch import Tensor

from qwen3_ascend.checkpoint.layout import ND, Cut, Layout
from qwen3_ascend.checkpoint.linear import quantize
from qwen3_ascend.checkpoint.schemes import BF16, W4A16, W8A8, W8A16, Scheme, w4a16, w8a16
from qwen3_ascend.checkpoint.sharding import shard
from qwen3_ascend.checkpoint.target import ASCEND_A2_A3
from qwen3_ascend.errors import CheckpointError

PARTS = {"single": (256,), "gate-up": (256, 256), "qkv": (512, 256, 256)}
INPUTS = 512
RANKS = [(world, rank) for world in (2, 4) for rank in range(world)]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def cut_by_hand(tensor: Tensor, cut: Cut, parts: tuple[int, ...], rank: int, world: int) -> Tensor:
    """A rank's piece of a plain weight [*batch, N, K]."""
    if cut == "inputs":
        return tensor.chunk(world, dim=-1)[rank]
    pieces = [part.chunk(world, dim=-2)[rank] for part in tensor.split(parts, dim=-2)]
    return torch.cat(pieces, dim=-2)


W8A8_NZ = ASCEND_A2_A3.layouts["w8a8"]

CASES: list[tuple[Scheme, Layout]] = [
    *((BF16(), layout) for layout in (Layout("nz", "KN", 16), Layout("nz", "NK", 16), ND)),
    *((W8A8(), layout) for layout in (W8A8_NZ, Layout("nz", "NK", 32), ND)),
    *((W8A16(), layout) for layout in (w8a16.NZ, ND)),
    *((W4A16(group), layout) for group in (32, 128) for layout in (w4a16.NZ, w4a16.ROWS, ND)),
    *((W4A16(64, zero_points=True), layout) for layout in (w4a16.NZ, w4a16.ROWS)),
    *((GroupInt4(group), layout) for group in (32, 128) for layout in LAYOUTS),
]


@pytest.mark.parametrize(
    ("batch", "bias"), [((), False), ((), True), ((3,), True)], ids=["plain", "bias", "experts"]
)
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize(("scheme", "layout"), CASES, ids=str)
@pytest.mark.parametrize("cut", ["outputs", "inputs"])
def test_cut_then_quantize_is_quantize_then_cut(
    cut: Cut, scheme: Scheme, layout: Layout, bias: bool, parts: tuple[int, ...],
    batch: tuple[int, ...],
) -> None:  # fmt: skip
    weight = random(*batch, sum(parts), INPUTS)
    offset = random(*batch, sum(parts)) if bias else None
    if scheme in (W8A8(), W8A16()) and cut == "inputs":
        weight[..., ::32] = 4.0  # every piece of a row then has the scale of the whole row
        weight.clamp_(-4, 4)
    whole = quantize(scheme, weight, offset, layout)
    for world, rank in RANKS:
        part = cut_by_hand(weight, cut, parts, rank, world)
        kept = None
        if offset is not None and (cut == "outputs" or rank == 0):
            kept = offset
            if cut == "outputs":
                kept = cut_by_hand(offset[..., None], cut, parts, rank, world)[..., 0]
        expected = quantize(scheme, part, kept, layout)
        actual = shard(whole, cut, parts, rank, world)
        assert (actual.scheme, actual.layout) == (scheme, layout)
        assert actual.shape == expected.shape
        assert actual.tensors.keys() == expected.tensors.keys()
        for name, tensor in expected.tensors.items():
            assert torch.equal(actual.tensors[name], tensor), (world, rank, name)


@pytest.mark.parametrize(("scheme", "layout"), CASES, ids=str)
@pytest.mark.parametrize("cut", ["outputs", "inputs"])
def test_ranks_together_compute_the_whole(cut: Cut, scheme: Scheme, layout: Layout) -> None:
    parts = PARTS["qkv"]
    whole = quantize(scheme, random(sum(parts), INPUTS), random(sum(parts)), layout)
    pieces = [shard(whole, cut, parts, rank, 2).dequantize() for rank in range(2)]
    if cut == "inputs":
        assert torch.equal(torch.cat(pieces, dim=1), whole.dequantize())
        return
    by_part = [piece.split([part // 2 for part in parts]) for piece in pieces]
    rows = [piece[index] for index in range(len(parts)) for piece in by_part]
    assert torch.equal(torch.cat(rows), whole.dequantize())


def test_one_rank_has_it_all() -> None:
    whole = quantize(W8A8(), random(64, 64), None, W8A8_NZ)
    assert shard(whole, "outputs", (64,), 0, 1) is whole


@pytest.mark.parametrize(
    ("scheme", "layout", "cut", "parts", "inputs", "message"),
    [
        # 48 rows are one and a half strips
        (W8A8(), W8A8_NZ, "outputs", (96,), 64, "inside a block of 32 of the weight"),
        (W8A8(), W8A8_NZ, "outputs", (99,), 64, "does not split over 2"),
        # the first part alone would do
        (W8A8(), W8A8_NZ, "outputs", (128, 96), 64, "inside a block"),
        (W8A8(), W8A8_NZ, "inputs", (64,), 48, "inside a block of 16 of the weight"),
        (W8A8(), W8A8_NZ, "inputs", (64,), 63, "does not split over 2"),
        # a strip of 32 bytes holds 64 codes
        (GroupInt4(32), LAYOUTS[0], "outputs", (96,), 64, "inside a block of 64 of the weight"),
        (GroupInt4(128), LAYOUTS[0], "inputs", (64,), 192, "inside a block of 128 of the scale"),
        (W4A16(64), w4a16.NZ, "outputs", (192,), 128, "inside a block of 64 of the weight"),
        (W4A16(32), w4a16.ROWS, "outputs", (24,), 128, "inside a block of 8 of the weight"),
        # four and a half groups of 128
        (W4A16(128), w4a16.ROWS, "inputs", (64,), 576, "inside a block of 128 of the scale"),
        (W4A16(128, True), w4a16.ROWS, "inputs", (64,), 576, "inside a block of 128 of the scale"),
    ],
)
def test_uneven_cuts_are_refused(
    scheme: Scheme, layout: Layout, cut: Cut, parts: tuple[int, ...], inputs: int, message: str
) -> None:
    whole = quantize(scheme, random(sum(parts), inputs), None, layout)
    with pytest.raises(CheckpointError, match=message):
        shard(whole, cut, parts, 1, 2)


def test_bias_of_a_cut_of_inputs_is_added_once() -> None:
    whole = quantize(W8A8(), random(64, 64), random(64), W8A8_NZ)
    pieces = [shard(whole, "inputs", (64,), rank, 2) for rank in range(2)]
    assert pieces[0].bias is not None and whole.bias is not None and pieces[1].bias is None
    assert torch.equal(pieces[0].bias, whole.bias)


@pytest.mark.parametrize(("scheme", "layout"), CASES, ids=str)
@pytest.mark.parametrize(("outputs", "most"), [(512, 512), (512, 200), (330, 128), (1000, 999)])
def test_parts_of_the_outputs(scheme: Scheme, layout: Layout, outputs: int, most: int) -> None:
    whole = quantize(scheme, random(outputs, INPUTS), random(outputs), layout)
    parts = whole.divide_outputs(most)
    sizes = [part.shape[-2] for part in parts]
    assert sum(sizes) == outputs and max(sizes) <= most
    unit = layout.place("outputs").unit  # what the last one may lack, and one more
    assert max(sizes) - min(sizes) < 2 * unit
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), whole.dequantize())
    assert parts[0].weight.data_ptr() == whole.weight.data_ptr()  # nothing is copied


@pytest.mark.parametrize(("world", "sizes"), [(1, [50624, 50656, 50656]), (2, [37984, 37984])])
def test_the_head_of_qwen3_in_parts(world: int, sizes: list[int]) -> None:
    """Also of a rank's share: parts are no property of the file."""
    weight = torch.zeros(151936, 1, dtype=torch.int8)
    head = quantize(W8A8(), weight.float(), None, W8A8_NZ)
    share = shard(head, "outputs", (151936,), world - 1, world)
    parts = share.divide_outputs(ASCEND_A2_A3.largest_dimension)
    assert [part.shape[-2] for part in parts] == sizes
    assert all(part.weight.is_contiguous() for part in parts)
