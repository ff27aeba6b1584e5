"""Linears on the CPU: those of exact integer products, and the table of all."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from typing_extensions import override

from qwen3_ascend import native
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
from qwen3_ascend.checkpoint.schemes.base import Input
from qwen3_ascend.checkpoint.schemes.w4a8 import GROUP, halves_of, shift_of
from qwen3_ascend.checkpoint.schemes.w8a8 import NZ
from qwen3_ascend.checkpoint.schemes.w8a8_static import folded_bias, static_input
from qwen3_ascend.native import Epilogue, FloatProducts, Products, StoredWeight
from qwen3_ascend.runtime.backends.base import Activation, DeviceLinear, as_codes, as_static
from qwen3_ascend.runtime.backends.cpu.float_linears import load_float, stored_weight
from qwen3_ascend.runtime.backends.cpu.int8_matmul import Product, pick_int8_matmul
from qwen3_ascend.runtime.backends.reference import FloatLinear, Loader
from qwen3_ascend.runtime.backends.reference import GroupInt4Linear as ReferenceGroupInt4Linear
from qwen3_ascend.runtime.backends.reference import Int8Linear as ReferenceInt8Linear
from qwen3_ascend.runtime.backends.reference import StaticInt8Linear as ReferenceStaticInt8Linear


class Int8Linear:
    """w8a8 by kernels that read the stored strips: nothing is unpacked."""

    input = Input.INT8_PER_TOKEN

    def __init__(self, linear: Linear, dtype: torch.dtype, products: Products) -> None:
        bias = None if linear.bias is None else linear.bias.float()
        epilogue = Epilogue(linear.tensors["scale"], dtype, bias=bias)
        self.weight = linear.weight
        self._product = products.of(linear.weight, matrix_of(linear), epilogue)

    def __call__(self, x: Activation) -> Tensor:
        """The product, [T, N]."""
        fed = as_codes(x)
        return self._product(fed.codes, fed.scale)


class StaticInt8Linear:
    """w8a8-static by the same kernels, which add quant_bias and the bias to the integer sum."""

    input = Input.INT8_STATIC

    def __init__(self, linear: Linear, dtype: torch.dtype, products: Products) -> None:
        self.static_input = static_input(linear.tensors)
        epilogue = Epilogue(linear.tensors["deq_scale"], dtype, added=folded_bias(linear))
        self.weight = linear.weight
        self._product = products.of(linear.weight, matrix_of(linear), epilogue)

    def __call__(self, x: Activation) -> Tensor:
        """The product, [T, N]."""
        return self._product(as_static(x))


class UnpackedInt8Linear(ReferenceInt8Linear):
    """w8a8 by the fastest exact product that torch has, whose form is another copy of the codes:
    where the kernels were not compiled, and for layouts that they do not read."""

    def __init__(self, linear: Linear, dtype: torch.dtype) -> None:
        super().__init__(linear, dtype)
        self._product: Product = pick_int8_matmul()(self.weight, 0)
        self.weight = linear.weight

    @override
    def product(self, codes: Tensor) -> Tensor:
        return self._product(codes)


class UnpackedStaticInt8Linear(ReferenceStaticInt8Linear):
    """w8a8-static likewise. A product that gives float32 has rounded already when a bias could be
    added to the integer: then it is another."""

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


def matrix_of(linear: Linear) -> tuple[int, int]:
    """(outputs, inputs) of a linear, which has no batch axes on a CPU."""
    outputs, inputs = linear.shape
    return outputs, inputs


def products_for(linear: Linear) -> Products | None:
    """The kernels that read a stored int8 weight as it lies, if there are such."""
    if linear.layout != NZ or not linear.weight.is_contiguous():
        return None
    return native.products()


def load_int8(linear: Linear, dtype: torch.dtype) -> DeviceLinear:
    """A linear of w8a8."""
    products = products_for(linear)
    return Int8Linear(linear, dtype, products) if products else UnpackedInt8Linear(linear, dtype)


def load_static_int8(linear: Linear, dtype: torch.dtype) -> DeviceLinear:
    """A linear of w8a8-static."""
    products = products_for(linear)
    if products is None:
        return UnpackedStaticInt8Linear(linear, dtype)
    return StaticInt8Linear(linear, dtype, products)


class GroupInt4Linear:
    """w4a8 by kernels that read the stored words, and take every step of the definition."""

    input = Input.INT8_PER_TOKEN

    def __init__(
        self, linear: Linear, stored: StoredWeight, dtype: torch.dtype, products: FloatProducts
    ) -> None:
        self.weight = linear.weight
        shared = linear.tensors["scale"], shift_of(linear.tensors)
        bias = None if linear.bias is None else linear.bias.float()
        self._product = products.of_groups(stored, *shared, dtype, bias)

    def __call__(self, x: Activation) -> Tensor:
        """The product, [T, N]."""
        fed = as_codes(x)
        return self._product(fed.codes, fed.scale)


class UnpackedGroupInt4Linear(ReferenceGroupInt4Linear):
    """w4a8 by the fastest exact product that torch has, one for each group, whose form is another
    copy of the codes; see UnpackedInt8Linear."""

    def __init__(self, linear: Linear, dtype: torch.dtype) -> None:
        super().__init__(linear, dtype)
        make = pick_int8_matmul()
        self._products = [make(group.contiguous(), 0) for group in self.weight.split(GROUP, 1)]
        self.weight = linear.weight

    @override
    def products(self, codes: Tensor) -> Iterator[Tensor]:
        groups = zip(halves_of(codes).split(GROUP, 1), self._products, strict=True)
        return (product(x.contiguous()) for x, product in groups)


def load_group_int4(linear: Linear, dtype: torch.dtype) -> DeviceLinear:
    """A linear of w4a8."""
    products = native.float_products()
    stored = stored_weight(linear)
    if products is None or stored is None:
        return UnpackedGroupInt4Linear(linear, dtype)
    return GroupInt4Linear(linear, stored, dtype, products)


LINEARS: dict[type[Scheme], Loader] = {
    BF16: load_float,
    W8A8: load_int8,
    W8A8Static: load_static_int8,
    W4A8: load_group_int4,
    W8A16: load_float,
    W4A16: load_float,
}

TORCH_LINEARS: dict[type[Scheme], Loader] = {
    **LINEARS,
    BF16: FloatLinear.load,
    W8A16: FloatLinear.load,
    W4A16: FloatLinear.load,
}
"""The same with torch's products of floats, which sum up in an order of their own; integers have
none."""
