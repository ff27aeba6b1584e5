"""Exact int8 matrix products on a CPU: the fastest way that this processor computes exactly.

Which way is exact depends on the processor (vector instructions before VNNI saturate in 16 bits),
so nothing is assumed: each candidate is tried once on extreme operands against an int64 product,
and the first that gives every integer is used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""int8 [T, K] -> float32, int32 or float64 [T, N]: the integer product, exact before any rounding
to float32."""

Candidate = Callable[[Tensor, int], Product]
"""(int8 weight [N, K], offset) -> the product of (codes - offset) with it."""

ZERO_POINT = 128
"""Shifts int8 activations to uint8: oneDNN's fast kernels take unsigned activations, and it
subtracts 128 times the weights' column sums again."""

PROBE_ROWS, PROBE_INPUTS, PROBE_OUTPUTS = 5, 2081, 48
"""2081 x 127 x 127 is odd and beyond 2^25: a kernel that sums in float32 cannot hold it."""


def onednn(weight: Tensor, offset: int = 0) -> Product:
    """oneDNN's u8 x s8 kernel on weights packed once; what it subtracts covers the offset."""
    outputs = weight.shape[0]
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    scales = torch.ones(outputs)
    zero_points = torch.zeros(outputs, dtype=torch.int32)

    def product(codes: Tensor) -> Tensor:
        shifted = codes.view(torch.uint8) ^ ZERO_POINT
        result: Tensor = torch.ops.onednn.qlinear_pointwise(
            shifted, 1.0, ZERO_POINT + offset, packed, scales, zero_points,
            None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return result

    return product


def int_mm(weight: Tensor, offset: int = 0) -> Product:
    """torch._int_mm: s8 x s8 to int32."""
    transposed = weight.t()

    def product(codes: Tensor) -> Tensor:
        return torch._int_mm(codes, transposed)

    return _without(product, offset * weight.sum(1, dtype=torch.int32))


def float64(weight: Tensor, offset: int = 0) -> Product:
    """Works everywhere: every sum of int8 products up to K = 2^38 is exact in float64."""
    wide = weight.double().t()

    def product(codes: Tensor) -> Tensor:
        return codes.double() @ wide

    return _without(product, offset * wide.sum(0))


def _without(product: Product, shift: Tensor) -> Product:
    """A product less what the offset adds to each output."""
    return (lambda codes: product(codes) - shift) if bool(shift.any()) else product


CANDIDATES: tuple[Candidate, ...] = (onednn, int_mm, float64)

OFFSETS = (0, -128, 127)
"""None, and the extreme ones of an int8 code."""


@functools.cache
def pick_int8_matmul(integers: bool = False) -> Candidate:
    """The first candidate that is exact on this processor; with `integers`, of those that do not
    round to float32, so that something can be added to the integer."""
    for candidate in CANDIDATES:
        if not (integers and candidate is onednn) and is_exact(candidate):
            return candidate
    raise AssertionError("not even float64 multiplies small integers exactly")


def is_exact(candidate: Candidate) -> bool:
    """Tries a candidate on extreme and on random operands, for one and for several rows."""
    generator = torch.Generator().manual_seed(0)
    shape = (PROBE_OUTPUTS, PROBE_INPUTS)
    weight = torch.randint(-128, 128, shape, generator=generator).to(torch.int8)
    weight[:8], weight[8:16] = 127, -128
    codes = torch.randint(-128, 128, (PROBE_ROWS, PROBE_INPUTS), generator=generator).to(torch.int8)
    codes[0], codes[1] = 127, -128
    exact = weight.long().t()
    try:
        for offset in OFFSETS:
            product, expected = candidate(weight, offset), (codes.long() - offset) @ exact
            for rows in (1, 2, 5):
                if not torch.equal(product(codes[:rows]).float(), expected[:rows].float()):
                    return False
    except (RuntimeError, AttributeError):  # the operator is not in this build of torch
        return False
    return True
