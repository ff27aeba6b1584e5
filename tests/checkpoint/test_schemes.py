"""Every scheme keeps its promises; the properties of w8a8's rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwen3_ascend.checkpoint.layout import ND, Layout
from qwen3_ascend.checkpoint.schemes import (
    BF16,
    SCHEMES,
    W8A8,
    Linear,
    scheme,
)
from qwen3_ascend.checkpoint.schemes.w8a8 import quantize_tokens
from qwen3_ascend.errors import CheckpointError

EPSILON = 2.0**-24
"""Half the distance from 1 to the next float32: the relative error of one rounding."""


def random_weight(outputs: int, inputs: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((outputs, inputs), generator=generator).bfloat16()


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("layout", ["default", "nd"])
@pytest.mark.parametrize("kind", SCHEMES.values(), ids=SCHEMES)
def test_what_a_scheme_promises(kind: type[Linear], layout: str, bias: bool) -> None:
    weight = random_weight(300, 70)
    offset = random_weight(1, 300, seed=1)[0] if bias else None
    chosen = kind.default_layout() if layout == "default" else ND
    linear = kind.quantize(weight, offset, chosen)
    forms = {name: (t.dtype, tuple(t.shape)) for name, t in linear.tensors().items()}
    assert forms == kind.stored((300, 70), chosen, bias)
    again = kind.from_tensors((300, 70), chosen, linear.tensors())
    assert torch.equal(again.dequantize(), linear.dequantize())
    covered = torch.cat([torch.arange(300)[rows] for rows, _ in linear.blocks()])
    assert covered.tolist() == list(range(300))
    x = random_weight(5, 70, seed=2).float()
    expected = x.double() @ weight.double().t() + (offset.double() if bias else 0)
    noise = 0.02 if kind is W8A8 else 1e-5
    assert (linear.reference(x).double() - expected).norm() < noise * expected.norm()
    assert SCHEMES[kind.scheme] is kind and scheme(kind.scheme) is kind


def test_unknown_scheme_names_the_known() -> None:
    with pytest.raises(CheckpointError, match=r"'w3a3'.*bf16.*w8a8"):
        scheme("w3a3")


def test_missing_tensor_is_a_key_error() -> None:
    for kind in SCHEMES.values():
        with pytest.raises(KeyError):
            kind.from_tensors((16, 16), ND, {})


def test_bf16_is_exact() -> None:
    weight = random_weight(50, 33)
    linear = BF16.quantize(weight, None, BF16.default_layout())
    assert torch.equal(linear.matrix(), weight)


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
    linear = W8A8.quantize(weight, None, W8A8.default_layout())
    codes, scale = linear.codes(), linear.scale
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
    whole = W8A8.quantize(weight, None, ND)
    shuffled = W8A8.quantize(weight[order], None, ND)
    assert torch.equal(shuffled.codes(), whole.codes()[order])
    assert torch.equal(shuffled.scale, whole.scale[order])


def test_ordinary_rows_use_the_whole_range() -> None:
    """max|w| / scale is within 127 (1 +- 2^-8 / 2), because only the scale was rounded."""
    linear = W8A8.quantize(random_weight(600, 64), None, ND)
    assert set(linear.codes().abs().amax(dim=1).tolist()) <= {127}


def test_zero_and_vanishing_rows() -> None:
    weight = torch.zeros(3, 40, dtype=torch.bfloat16)
    weight[1, 7] = 2.0**-133  # the smallest bfloat16: max / 127 is no bfloat16 any more
    weight[2, 3] = -1.0
    linear = W8A8.quantize(weight, None, ND)
    assert linear.scale[:2].tolist() == [1.0, 1.0]
    assert int(linear.codes()[:2].abs().max()) == 0
    assert linear.codes()[2, 3] == -127
    assert bool(torch.isfinite(linear.dequantize()).all())


@pytest.mark.parametrize("largest", [2.0**-118, 2.0**-100, 1e-20, 1e20, 3.3e38])
def test_huge_and_tiny_magnitudes_keep_their_precision(largest: float) -> None:
    weight = (random_weight(8, 64).float().clamp(-3, 3) / 3 * largest).bfloat16()
    linear = W8A8.quantize(weight, None, ND)
    error = (linear.dequantize().double() - weight.double()).abs()
    assert bool((error <= 0.51 * linear.scale.double()[:, None]).all())


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
    linear = W8A8.quantize(weight, None, Layout("nz", "KN", 32))
    codes, scale = quantize_tokens(x)
    totals = codes.numpy().astype(object) @ linear.codes().numpy().astype(object).T
    exact = totals.astype(np.float64) * scale.double().numpy()[:, None]
    exact *= linear.scale.double().numpy()
    # One rounding of the sum to float32, and one for each of the two products.
    assert np.all(np.abs(linear.reference(x).numpy() - exact) <= 3.01 * EPSILON * np.abs(exact))
