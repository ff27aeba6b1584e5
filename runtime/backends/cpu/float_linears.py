"""Linears on the CPU whose weights are multiplied as floats, whatever they are stored as."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen3_ascend import native
from qwen3_ascend.checkpoint.linear import Linear
from qwen3_ascend.checkpoint.schemes import BF16, W4A8, W4A16, W8A16
from qwen3_ascend.checkpoint.schemes.base import Input
from qwen3_ascend.native import FloatProducts, StoredWeight
from qwen3_ascend.runtime.backends.base import Activation, DeviceLinear, as_float
from qwen3_ascend.runtime.backends.reference import FloatLinear


class StoredFloatLinear:
    """bf16, w8a16 or w4a16 by kernels that read the weight as it is stored: nothing is decoded
    but what is in a core's cache."""

    input = Input.FLOAT

    def __init__(
        self,
        stored: StoredWeight,
        bias: Tensor | None,
        dtype: torch.dtype,
        products: FloatProducts,
    ) -> None:
        """A weight [N, K], an optional bias [N] of any float type, and the compute type."""
        self.weight = stored.tensors[0]
        self._product = products.of(stored, dtype, None if bias is None else bias.float())

    def __call__(self, x: Activation) -> Tensor:
        """The product, [T, N]."""
        return self._product(as_float(x))


def load_float(linear: Linear, dtype: torch.dtype) -> DeviceLinear:
    """A linear of bf16, w8a16 or w4a16; decoded once and for all where kernels were not compiled,
    and for what they cannot read as it lies."""
    products = native.float_products()
    stored = stored_weight(linear) if products else None
    if products is None or stored is None:
        return FloatLinear.load(linear, dtype)
    return StoredFloatLinear(stored, linear.bias, dtype, products)


def dense(weight: Tensor, bias: Tensor | None) -> DeviceLinear:
    """A linear of a plain weight [N, K] in the compute type, and a bias [N]."""
    products = native.float_products()
    stored = native.stored_runs(weight, (weight.shape[0], weight.shape[1])) if products else None
    if products is None or stored is None:
        return FloatLinear(weight, bias)
    return StoredFloatLinear(stored, bias, weight.dtype, products)


def stored_weight(linear: Linear) -> StoredWeight | None:
    """Where the weight of a linear [N, K] lies; None if no kernel reads it there."""
    outputs, inputs = linear.shape
    shape, scheme, tensors = (outputs, inputs), linear.scheme, linear.tensors
    if isinstance(scheme, BF16):
        return native.stored_runs(linear.weight, shape)
    if linear.layout.nz_of != "KN":
        return None
    if isinstance(scheme, W4A8):  # whose scales are no part of what is multiplied
        return native.stored_codes(linear.weight, shape)
    if isinstance(scheme, W8A16):
        return native.stored_codes(linear.weight, shape, tensors["scale"][None])
    assert isinstance(scheme, W4A16), f"{scheme} is not multiplied as floats"
    shared = tensors["scale"], tensors.get("offset")
    return native.stored_codes(linear.weight, shape, *shared, scheme.group)
