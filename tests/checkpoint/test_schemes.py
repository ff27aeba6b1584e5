"""Every scheme keeps its promises; the properties of w8a8's rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.group_scheme import LAYOUTS, GroupInt4
from torch import Tensor

from qwen3_ascend import native
from qwen3_ascend.checkpoint.layout import ND, Layout
from qwen3_ascend.checkpoint.linear import Linear, quantize, stored_forms
from qwen3_ascend.checkpoint.schemes import (
    BF16,
    SCHEMES,
    W4A16,
    W8A8,
    InputRange,
    Scheme,
    make_scheme,
    w4a16,
)
from qwen3_ascend.checkpoint.schemes.pieces import Piece, Stack
from qwen3_ascend.checkpoint.schemes.w8a8 import quantize_tokens
from qwen3_ascend.checkpoint.target import ASCEND_A2_A3
from qwen3_ascend.errors import CheckpointError
from qwen3_ascend.files.safetensors import Form

EPSILON = 2.0**-24
"""Half the distance from 1 to the next float32: the relative error of one rounding."""


def random_weight(outputs: int, inputs: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((outputs, inputs), generator=generator).bfloat16()


CASES: list[tuple[Scheme, Layout]] = [
    *((SCHEMES[name](), layout) for name, layout in ASCEND_A2_A3.layouts.items()),
    *((scheme(), ND) for scheme in SCHEMES.values()),
    *((W4A16(group), layout) for group in (32, 64) for layout in (w4a16.NZ, w4a16.ROWS)),
    *((W4A16(32, zero_points=True), layout) for layout in (w4a16.NZ, w4a16.ROWS, ND)),
    *((GroupInt4(group), layout) for group in (32, 128) for layout in LAYOUTS),
]


NOISE = {
    "bf16": 0.0,
    "w8a8": 0.01,
    "w8a8-static": 0.01,
    "w8a16": 0.01,
    "w4a8": 0.25,
    "w4a16": 0.13,
    "group-int4": 0.15,
}
"""Errors of random weights, relative to their norm."""


def w8a8(weight: Tensor, layout: Layout = ND) -> Linear:
    return quantize(W8A8(), weight, None, layout)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("scheme", "layout"), CASES, ids=str)
@pytest.mark.parametrize("shape", [(300, 70), (3, 50, 33)], ids=str)
def test_what_a_scheme_promises(
    scheme: Scheme, layout: Layout, bias: bool, shape: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).bfloat16()
    offset = torch.randn(shape[:-1], generator=generator).bfloat16() if bias else None
    linear = quantize(scheme, weight, offset, layout)
    forms = {suffix: Form(t.dtype, tuple(t.shape)) for suffix, t in linear.tensors.items()}
    assert forms == stored_forms(scheme, shape, layout, bias)
    # The pieces and their kernels give what the whole gives by the readable way.
    codes = scheme.choose(weight)
    for suffix, tensor in scheme.pack(codes, layout).items():
        assert torch.equal(tensor, linear.tensors[suffix]), suffix
    again = linear.codes()
    assert all(torch.equal(again[suffix], tensor) for suffix, tensor in codes.items())
    noise = NOISE[scheme.name]
    error = (linear.dequantize().double() - weight.double()).norm()
    assert error <= noise * weight.double().norm()
    if len(shape) == 2:
        x = torch.randn((5, shape[1]), generator=generator)
        linear = linear.for_inputs(InputRange(float(x.min()), float(x.max())))
        expected = x.double() @ linear.dequantize().double().t()
        expected += offset.double() if offset is not None else 0
        found = linear.reference(x).double()
        assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize(
    "scheme", [BF16(), W8A8(), W4A16(64), W4A16(128, True), GroupInt4(64)], ids=str
)
def test_a_scheme_comes_back_from_the_manifest(scheme: Scheme) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCHEMES, GroupInt4.name, GroupInt4)
        said = scheme.to_json()
        assert make_scheme(said.pop("name"), said) == scheme
        with pytest.raises(CheckpointError, match="no parameter 'grop'.*it has: group"):
            make_scheme("group-int4", {"grop": 3})


def test_other_codes_than_the_nearest_can_be_packed() -> None:
    """An algorithm of its own chooses codes; the scheme lays them out and knows what they mean."""
    scheme, layout = GroupInt4(32), LAYOUTS[0]
    weight = random_weight(40, 64)
    codes = dict(scheme.choose(weight))
    codes["weight"] = codes["weight"].clone()
    codes["weight"][3, 5] = -8
    linear = Linear(scheme, (40, 64), layout, scheme.pack(codes, layout))
    assert torch.equal(linear.codes()["weight"], codes["weight"])
    assert linear.dequantize()[3, 5] == -8 * codes["scale"][0, 3]


@pytest.mark.parametrize(("scheme", "layout"), CASES, ids=str)
def test_errors_are_those_of_the_stored_bytes(scheme: Scheme, layout: Layout) -> None:
    weight = random_weight(70, 96).float() * 1.001
    linear, source = quantize(scheme, weight, None, layout), Stack((weight,))
    for kernels in (native.best(), native.TorchKernels()):
        for piece in scheme.pieces((70, 96), layout):
            packed = scheme.pack_piece(source, piece, layout, kernels)
            again = scheme.errors(linear.piece(piece), source, piece, kernels)
            assert packed.sums is not None and again is not None
            assert torch.equal(again.noise, packed.sums.noise)
            assert torch.equal(again.signal, packed.sums.signal)
            part = Piece(piece.axis, piece.start, piece.stop)
            exact, decoded = source.piece(part).double(), linear.piece(part).dequantize().double()
            assert float(again.noise.sum()) == pytest.approx(
                float((exact - decoded).square().sum())
            )


def test_what_a_scheme_is_called() -> None:
    assert str(W8A8()) == "w8a8" and str(W4A16(32)) == "w4a16 (group 32)"
    assert str(W4A16(64, zero_points=True)) == "w4a16 (group 64, zero points)"


def test_zero_points_by_hand() -> None:
    """A range of -1 to 2 in steps of 0.2: zero is the sixth of sixteen integers, -3."""
    weight = torch.linspace(-1, 2, 16).repeat(2)[None].clone()
    weight[0, 7] = 0.0
    weight = torch.cat([weight, weight.abs() + 1, torch.zeros(1, 32)], dim=1)
    weight = torch.nn.functional.pad(weight, (0, 0, 0, 7))
    codes = quantize(W4A16(32, zero_points=True), weight, None, w4a16.ROWS).codes()
    scale, offset = (codes[suffix][:, 0].tolist() for suffix in ("scale", "offset"))
    assert offset == [3, 8, 8] and scale == pytest.approx([0.2, 0.2, 1.0], rel=2**-8)
    assert codes["weight"][0, :16].tolist() == [*range(-8, -1), -3, *range(0, 8)]
    assert codes["weight"][0, 7] + offset[0] == 0
    assert int(codes["weight"][0, 32:64].max()) == 7  # the range of positive weights begins at zero
    assert bool((codes["weight"][0, 64:] == -8).all())


@settings(max_examples=200)
@given(st.data())
def test_zero_points_leave_half_a_step(data: st.DataObject) -> None:
    """Of any weights, as long as bfloat16 has the step; and what was zero stays zero."""
    weight = data.draw(weights()).float()
    linear = quantize(W4A16(32, zero_points=True), weight, None, ND)
    codes = linear.codes()
    scale, offset = (codes[suffix].t().double() for suffix in ("scale", "offset"))
    assert bool((scale > 0).all()) and bool((offset == offset.round()).all())
    assert int(offset.min()) >= -7 and int(offset.max()) <= 8
    error = (linear.dequantize().double() - weight.double()).abs()
    # The step was rounded to bfloat16, and the outermost integers are fifteen away from zero.
    assert bool((error <= (0.5 + 16 * 2**-8) * scale)[(scale > 2.0**-120).expand_as(error)].all())
    assert not linear.dequantize()[weight == 0].any()


def test_unknown_scheme_names_the_known() -> None:
    with pytest.raises(CheckpointError, match=r"'w3a3'.*bf16.*w8a8"):
        make_scheme("w3a3", {})


def test_missing_tensor_is_a_key_error() -> None:
    for kind in SCHEMES.values():
        with pytest.raises(KeyError):
            Linear(kind(), (16, 16), ND, {}).codes()


def test_bf16_is_exact() -> None:
    weight = random_weight(50, 33)
    linear = quantize(BF16(), weight, None, ASCEND_A2_A3.layouts["bf16"])
    assert torch.equal(linear.codes()["weight"], weight)


# Rows of finite bfloat16 numbers by their bits, so that every magnitude is as likely as any other.
FINITE_BITS = st.integers(0, 0xFFFF).filter(lambda bits: bits & 0x7F80 != 0x7F80)


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    bits = draw(st.lists(FINITE_BITS, min_size=rows * columns, max_size=rows * columns))
    raw = np.array(bits, dtype=np.uint16).astype(np.int16)
    return torch.from_numpy(raw).view(torch.bfloat16).reshape(rows, columns)


@settings(max_examples=300)
@given(weights())
def test_scales_are_bf16_and_codes_are_the_nearest(weight: Tensor) -> None:
    linear = w8a8(weight, ASCEND_A2_A3.layouts["w8a8"])
    codes, scale = linear.codes()["weight"], linear.codes()["scale"]
    assert scale.dtype == torch.float32 and torch.equal(scale.bfloat16().float(), scale)
    assert bool((scale > 0).all()) and bool(torch.isfinite(scale).all())
    # No other code is nearer, but for the rounding of the one float32 division.
    exact = weight.double()
    candidates = torch.arange(-128, 128).double()[None, None] * scale.double()[:, None, None]
    nearest = (candidates - exact[..., None]).abs().amin(dim=-1)
    chosen = (codes.double() * scale.double()[:, None] - exact).abs()
    assert bool((chosen <= nearest + 2 * EPSILON * exact.abs()).all())


@given(weights())
def test_rows_are_quantized_by_themselves(weight: Tensor) -> None:
    order = torch.randperm(weight.shape[0], generator=torch.Generator().manual_seed(0))
    whole = w8a8(weight)
    shuffled = w8a8(weight[order])
    assert torch.equal(shuffled.codes()["weight"], whole.codes()["weight"][order])
    assert torch.equal(shuffled.tensors["scale"], whole.tensors["scale"][order])


def test_ordinary_rows_use_the_whole_range() -> None:
    """max|w| / scale is within 127 (1 +- 2^-8 / 2), because only the scale was rounded."""
    linear = w8a8(random_weight(600, 64))
    assert set(linear.codes()["weight"].abs().amax(dim=1).tolist()) <= {127}


def test_zero_and_vanishing_rows() -> None:
    weight = torch.zeros(3, 40, dtype=torch.bfloat16)
    weight[1, 7] = 2.0**-133  # the smallest bfloat16: max / 127 is no bfloat16 any more
    weight[2, 3] = -1.0
    linear = w8a8(weight)
    assert linear.tensors["scale"][:2].tolist() == [1.0, 1.0]
    assert int(linear.codes()["weight"][:2].abs().max()) == 0
    assert linear.codes()["weight"][2, 3] == -127
    assert bool(torch.isfinite(linear.dequantize()).all())


@pytest.mark.parametrize("largest", [2.0**-118, 2.0**-100, 1e-20, 1e20, 3.3e38])
def test_huge_and_tiny_magnitudes_keep_their_precision(largest: float) -> None:
    weight = (random_weight(8, 64).float().clamp(-3, 3) / 3 * largest).bfloat16()
    linear = w8a8(weight)
    error = (linear.dequantize().double() - weight.double()).abs()
    assert bool((error <= 0.51 * linear.tensors["scale"].double()[:, None]).all())


TOKENS = st.lists(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=4, max_size=4),
    min_size=1,
    max_size=5,
)


@settings(max_examples=300)
@given(TOKENS)
def test_tokens(rows: list[list[float]]) -> None:
    x = torch.tensor(rows)
    codes, scale = quantize_tokens(x)
    assert torch.equal(scale, x.abs().amax(dim=1) / 127)
    assert int(codes.abs().max()) <= 127  # symmetric: -128 never occurs
    assert bool((codes[scale == 0] == 0).all())
    normal = scale > 2.0**-120  # below, float32 itself runs out of digits
    error = (codes.double() * scale.double()[:, None] - x.double()).abs()
    limit = 0.5 * scale.double()[:, None] + 200 * EPSILON * scale.double()[:, None]
    assert bool((error <= limit)[normal].all())


def test_reference_is_the_contract_in_whole_numbers() -> None:
    weight, x = random_weight(40, 96), random_weight(7, 96, seed=3).float()
    linear = w8a8(weight, Layout("nz", "KN", 32))
    codes, scale = quantize_tokens(x)
    totals = codes.numpy().astype(object) @ linear.codes()["weight"].numpy().astype(object).T
    exact = totals.astype(np.float64) * scale.double().numpy()[:, None]
    exact *= linear.tensors["scale"].double().numpy()
    # One rounding of the sum to float32, and one for each of the two products.
    assert np.all(np.abs(linear.reference(x).numpy() - exact) <= 3.01 * EPSILON * np.abs(exact))
