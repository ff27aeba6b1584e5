"""Linears on the CPU: one for float weights, one for exact integer products."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from typing_extensions import override

from qwen3_ascend.checkpoint.linear import Linear
from qwen3_ascend.checkpoint.schemes import (
    BF16,
    W4A8,
    W4A16,
    W8A8,
    W8A16,
    Scheme,
    W8A8Static,
)
from qwen3_ascend.checkpoint.schemes.w4a8 import GROUP, halves_of
from qwen3_ascend.runtime.backends.cpu.int8_matmul import Product, pick_int8_matmul
from qwen3_ascend.runtime.backends.reference import FloatLinear, Loader
from qwen3_ascend.runtime.backends.reference import GroupInt4Linear as ReferenceGroupInt4Linear
from qwen3_ascend.runtime.backends.reference import Int8Linear as ReferenceInt8Linear
from qwen3_ascend.runtime.backends.reference import StaticInt8Linear as ReferenceStaticInt8Linear


class Int8Linear(ReferenceInt8Linear):
    """w8a8 by the fastest exact product of this processor; the codes are kept in its form only."""

    def __init__(self, linear: Linear, dtype: torch.dtype) -> None:
        super().__init__(linear, dtype)
        self._product: Product = pick_int8_matmul()(self.weight, 0)
        self.weight = linear.weight

    @override
    def product(self, codes: Tensor) -> Tensor:
        return self._product(codes)


class StaticInt8Linear(ReferenceStaticInt8Linear):
    """w8a8-static by the same product, which takes the offset off by itself. A product that gives
    float32 has rounded already when a bias could be added to the integer: then it is another."""

    def __init__(self, linear: Linear, dtype: torch.dtype) -> None:
        super().__init__(linear, dtype)
        bias = self.bias - linear.tensors["quant_bias"]
        self._added = bias if bool(bias.any()) else None
        make = pick_int8_matmul(integers=self._added is not None)
        self._product: Product = make(self.weight, self.static_input.offset)
        self.weight = linear.weight

    @override
    def sums(self, codes: Tensor) -> Tensor:
        sums = self._product(codes)
        return sums if self._added is None else sums + self._added


class GroupInt4Linear(ReferenceGroupInt4Linear):
    """w4a8 by the fastest exact product of this processor, one for each group."""

    def __init__(self, linear: Linear, dtype: torch.dtype) -> None:
        super().__init__(linear, dtype)
        make = pick_int8_matmul()
        self._products = [make(group.contiguous(), 0) for group in self.weight.split(GROUP, 1)]
        self.weight = linear.weight

    @override
    def products(self, codes: Tensor) -> Iterator[Tensor]:
        groups = zip(halves_of(codes).split(GROUP, 1), self._products, strict=True)
        return (product(x.contiguous()) for x, product in groups)


LINEARS: dict[type[Scheme], Loader] = {
    BF16: FloatLinear.load,
    W8A8: Int8Linear,
    W8A8Static: StaticInt8Linear,
    W4A8: GroupInt4Linear,
    W8A16: FloatLinear.load,
    W4A16: FloatLinear.load,
}
