"""Linears of all experts of a layer on a CPU, by kernels that read weights as they are stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qwen3_ascend import native
from qwen3_ascend.checkpoint.linear import Linear
from qwen3_ascend.checkpoint.schemes import BF16, W8A8, Input
from qwen3_ascend.checkpoint.schemes.w8a8 import NZ
from qwen3_ascend.native import FloatExperts, Int8Experts
from qwen3_ascend.native.mixture import MOST_EXPERTS


@dataclass(frozen=True, eq=False)
class StoredExperts:
    """A linear of every expert; see DeviceExperts.

    Attributes:
        product: of the rows of all experts with their weights.
        input: what it wants to be fed.
        weight: the stored one, of all experts.
    """

    product: Int8Experts | FloatExperts
    input: Input
    weight: torch.Tensor


def load_experts(linear: Linear, dtype: torch.dtype) -> StoredExperts | None:
    """A stored linear [experts, N, K]; None if no kernel reads it as it lies."""
    experts, outputs, inputs = linear.shape
    shape, weight = (outputs, inputs), linear.weight
    if experts > MOST_EXPERTS or not weight.is_contiguous():
        return None
    if isinstance(linear.scheme, W8A8) and linear.layout == NZ:
        products = native.products()
        if products is None:
            return None
        product = Int8Experts(products, weight, shape, linear.tensors["scale"], dtype)
        return StoredExperts(product, Input.INT8_PER_TOKEN, weight)
    floats = native.float_products()
    if floats is None or not isinstance(linear.scheme, BF16):
        return None
    first = native.stored_runs(weight[0], shape)
    if first is None:
        return None
    return StoredExperts(FloatExperts(floats, weight, first, dtype), Input.FLOAT, weight)
