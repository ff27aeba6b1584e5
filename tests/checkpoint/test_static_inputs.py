"""w8a8-static: what a range becomes, exact sums, the bias, and cuts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qwen3_ascend.checkpoint.layout import ND, Cut, Layout
from qwen3_ascend.checkpoint.linear import Linear, quantize
from qwen3_ascend.checkpoint.schemes import InputRange, W8A8Static
from qwen3_ascend.checkpoint.schemes.w8a8_static import (
    StaticInput,
    channel_scale,
    folded_bias,
    scale_and_offset,
    static_input,
)
from qwen3_ascend.checkpoint.sharding import shard
from qwen3_ascend.checkpoint.target import ASCEND_A2_A3
from qwen3_ascend.errors import CheckpointError

NZ = ASCEND_A2_A3.layouts["w8a8-static"]
LAYOUTS = (NZ, Layout("nz", "NK", 32), ND)
INPUTS = InputRange(-0.7, 2.9)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def stored(
    weight: Tensor, bias: Tensor | None = None, layout: Layout = NZ, inputs: InputRange = INPUTS
) -> Linear:
    return quantize(W8A8Static(), weight, bias, layout).for_inputs(inputs)


FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)


@given(FLOATS, FLOATS)
def test_a_range_takes_all_codes_and_has_zero_exactly(first: float, second: float) -> None:
    inputs = InputRange(min(first, second), max(first, second))
    scale, offset = scale_and_offset(inputs)
    made = StaticInput.of(scale, offset)
    for number in (scale, made.reciprocal):
        assert float(torch.tensor(number).bfloat16()) == number and 0 < number < math.inf
    assert -128 <= offset <= 127
    assert made.quantize(torch.zeros(1)).item() == offset
    least, largest = min(inputs.least, 0.0), max(inputs.largest, 0.0)
    if largest - least < 1e-30:
        return
    # Both roundings to bfloat16 can move an end by 2^-8 of 255 steps.
    ends = made.quantize(torch.tensor([least, largest])).double()
    assert ends[1] - ends[0] >= 253
    decoded = (ends - offset) / made.reciprocal
    step = 1 / made.reciprocal
    assert abs(decoded[0] - least) <= 1.6 * step and abs(decoded[1] - largest) <= 1.6 * step


def test_inputs_of_zeros_have_the_scale_one() -> None:
    assert scale_and_offset(InputRange(0.0, 0.0)) == (1.0, -128)
    assert scale_and_offset(InputRange(0.0, 1e-42))[0] > 0


@pytest.mark.parametrize(
    "bounds", [(1.0, 0.0), (math.nan, 1.0), (0.0, math.nan), (-math.inf, 0.0), (0.0, math.inf)]
)
def test_what_is_no_range(bounds: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="are no range"):
        InputRange(*bounds)


def test_codes_are_rounded_after_the_offset_was_added_and_clipped() -> None:
    made = StaticInput(0.5, 3)
    x = torch.tensor([0.0, 1.0, 3.0, -1.0, 1e9, -1e9])
    # 3.5, 4.5 and 2.5 go to the even neighbour; before the offset 0.5 would have gone to 0.
    assert made.quantize(x).tolist() == [3, 4, 4, 2, 127, -128]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_sums_are_exact(layout: Layout) -> None:
    """Against whole numbers of Python; beyond 2^24, where float32 has no last bit any more."""
    weight, bias = random(33, 2081), random(33, seed=1) * 900
    weight[:8] = 3.0
    linear = stored(weight, bias, layout)
    x = random(5, 2081, seed=2).float().abs() * 3
    codes = static_input(linear.tensors).quantize(x)
    scale = linear.tensors["deq_scale"]
    offset = int(linear.tensors["input_offset"])
    moved = codes.numpy().astype(object) - offset
    sums = moved @ linear.codes()["weight"].numpy().astype(object).T
    assert max(abs(sums).flat) > 1 << 24
    whole = linear.scheme.product(linear.codes(), x)
    assert torch.equal(whole, torch.tensor(sums.astype(np.float64)).float() * scale)
    folded = folded_bias(linear) - linear.tensors["quant_bias"]
    assert torch.equal(folded.double(), torch.round(bias.float() / scale).double())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", [(70, 45), (3, 33, 50)], ids=str)
def test_what_is_stored(layout: Layout, shape: tuple[int, ...]) -> None:
    weight = random(*shape)
    linear, plain = stored(weight, None, layout), quantize(W8A8Static(), weight, None, layout)
    codes, scale = linear.codes(), channel_scale(plain.tensors)
    assert torch.equal(codes["weight"], plain.codes()["weight"])
    assert torch.equal(scale, scale.bfloat16().float())
    assert torch.equal(channel_scale(linear.tensors), scale)
    assert torch.equal(linear.dequantize(), plain.dequantize())
    expected = -codes["input_offset"].int() * codes["weight"].int().sum(-1)
    assert torch.equal(codes["quant_bias"], expected) and bool(expected.any())
    again = linear.for_inputs(InputRange(-3, 1)).for_inputs(INPUTS)
    for suffix, tensor in linear.tensors.items():
        assert torch.equal(again.tensors[suffix], tensor), suffix
    assert not plain.tensors["quant_bias"].any() and bool((plain.tensors["input_scale"] == 1).all())


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("cut", ["outputs", "inputs"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_cut_is_what_the_cut_weight_becomes(cut: Cut, layout: Layout, world: int) -> None:
    weight, bias = random(256, 512), random(256, seed=1)
    weight[:, ::32] = 4.0  # every piece of a row then has the scale of the whole row
    weight.clamp_(-4, 4)
    whole = stored(weight, bias, layout)
    parts = [shard(whole, cut, (256,), rank, world) for rank in range(world)]
    axis = 0 if cut == "outputs" else 1
    for rank, part in enumerate(parts):
        kept = bias.chunk(world)[rank] if cut == "outputs" else None if rank else bias
        expected = stored(weight.chunk(world, axis)[rank], kept, layout)
        assert part.tensors.keys() == expected.tensors.keys()
        for suffix, tensor in expected.tensors.items():
            assert torch.equal(part.tensors[suffix], tensor), (rank, suffix)
    x = random(3, 512, seed=2).float()
    pieces = [x] * world if cut == "outputs" else x.chunk(world, 1)
    products = [part.reference(piece) for part, piece in zip(parts, pieces, strict=True)]
    found = torch.cat(products, 1) if cut == "outputs" else torch.stack(products).sum(0)
    torch.testing.assert_close(found, whole.reference(x), rtol=1e-5, atol=1e-4)


def test_outputs_behind_a_vocabulary_are_zero() -> None:
    padded = stored(random(40, 64), random(40)).pad_outputs(64)
    assert not padded.reference(random(2, 64).float())[:, 40:].any()
    assert folded_bias(padded).shape == (64,)


def test_parts_share_their_input() -> None:
    whole = stored(random(300, 64), random(300))
    parts = whole.divide_outputs(128)
    assert len(parts) > 2
    assert torch.equal(torch.cat([folded_bias(part) for part in parts]), folded_bias(whole))
    assert {static_input(part.tensors) for part in parts} == {static_input(whole.tensors)}


def test_a_bias_beyond_the_integers_is_refused() -> None:
    weight, bias = random(4, 64), torch.zeros(4).bfloat16()
    weight[2] = 2.0**-100
    bias[2] = 3.0
    with pytest.raises(CheckpointError, match="a bias of 3 cannot be added to int32 sums"):
        folded_bias(stored(weight, bias))
