"""Linears on the CPU: one for float weights, one for exact integer products."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from qwen3_ascend.checkpoint.linear import Linear
from qwen3_ascend.checkpoint.schemes import BF16, W4A16, W8A8, W8A16, Scheme
from qwen3_ascend.runtime.backends.cpu.int8_matmul import Product, pick_int8_matmul
from qwen3_ascend.runtime.backends.reference import FloatLinear, Loader
from qwen3_ascend.runtime.backends.reference import Int8Linear as ReferenceInt8Linear


class Int8Linear(ReferenceInt8Linear):
    """w8a8 by the fastest exact product of this processor; the codes are kept in its form only."""

    def __init__(self, linear: Linear, dtype: torch.dtype) -> None:
        super().__init__(linear, dtype)
        self._product: Product = pick_int8_matmul()(self.weight)
        self.weight = linear.weight

    @override
    def product(self, codes: Tensor) -> Tensor:
        return self._product(codes)


LINEARS: dict[type[Scheme], Loader] = {
    BF16: FloatLinear.load,
    W8A8: Int8Linear,
    W8A16: FloatLinear.load,
    W4A16: FloatLinear.load,
}
