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
"""int8 [T, K] -> float32 or int32 [T, N]: the integer product, exact before any rounding to
float32."""

ZERO_POINT = 128
"""Shifts int8 activations to uint8: oneDNN's fast kernels take unsigned activations, and it
subtracts 128 times the weights' column sums again."""

PROBE_ROWS, PROBE_INPUTS, PROBE_OUTPUTS = 5, 2081, 48
"""2081 x 127 x 127 is odd and beyond 2^25: a kernel that sums in float32 cannot hold it."""


def onednn(weight: Tensor) -> Product:
    """oneDNN's u8 x s8 kernel on weights packed once."""
    outputs = weight.shape[0]
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    scales = torch.ones(outputs)
    zero_points = torch.zeros(outputs, dtype=torch.int32)

    def product(codes: Tensor) -> Tensor:
        shifted = codes.view(torch.uint8) ^ ZERO_POINT
        result: Tensor = torch.ops.onednn.qlinear_pointwise(
            shifted, 1.0, ZERO_POINT, packed, scales, zero_points,
            None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return result

    return product


def int_mm(weight: Tensor) -> Product:
    """torch._int_mm: s8 x s8 to int32."""
    transposed = weight.t()

    def product(codes: Tensor) -> Tensor:
        return torch._int_mm(codes, transposed)

    return product


def float64(weight: Tensor) -> Product:
    """Works everywhere: every sum of int8 products up to K = 2^38 is exact in float64."""
    wide = weight.double().t()

    def product(codes: Tensor) -> Tensor:
        return codes.double() @ wide

    return product


CANDIDATES: tuple[Callable[[Tensor], Product], ...] = (onednn, int_mm, float64)


@functools.cache
def pick_int8_matmul() -> Callable[[Tensor], Product]:
    """The first candidate that is exact on this processor."""
    for candidate in CANDIDATES:
        if is_exact(candidate):
            return candidate
    raise AssertionError("not even float64 multiplies small integers exactly")


def is_exact(candidate: Callable[[Tensor], Product]) -> bool:
    """Tries a candidate on extreme and on random operands, for one and for several rows."""
    generator = torch.Generator().manual_seed(0)
    shape = (PROBE_OUTPUTS, PROBE_INPUTS)
    weight = torch.randint(-128, 128, shape, generator=generator).to(torch.int8)
    weight[:8], weight[8:16] = 127, -128
    codes = torch.randint(-128, 128, (PROBE_ROWS, PROBE_INPUTS), generator=generator).to(torch.int8)
    codes[0], codes[1] = 127, -128
    expected = (codes.long() @ weight.long().t()).float()
    try:
        product = candidate(weight)
        return all(
            torch.equal(product(codes[:rows]).float(), expected[:rows]) for rows in (1, 2, 5)
        )
    except (RuntimeError, AttributeError):  # the operator is not in this build of torch
        return False
