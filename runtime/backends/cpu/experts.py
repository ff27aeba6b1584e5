"""Linears of all experts of a layer on a CPU, by kernels that read weights as they are stored."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from qwen3_ascend import native
from qwen3_ascend.checkpoint.linear import Linear
from qwen3_ascend.checkpoint.schemes import W4A8, W8A8, Input
from qwen3_ascend.checkpoint.schemes.w4a8 import shift_of
from qwen3_ascend.checkpoint.schemes.w8a8 import NZ
from qwen3_ascend.native import FloatExperts, GroupExperts, Int8Experts
from qwen3_ascend.native.mixture import MOST_EXPERTS
from qwen3_ascend.runtime.backends.cpu.float_linears import stored_weight


@dataclass(frozen=True, eq=False)
class StoredExperts:
    """A linear of every expert; see DeviceExperts.

    Attributes:
        product: of the rows of all experts with their weights.
        input: what it wants to be fed.
        weight: the stored one, of all experts.
        linear: whose it is.
    """

    product: Int8Experts | FloatExperts | GroupExperts
    input: Input
    weight: torch.Tensor
    linear: Linear


Kernels = Int8Experts | FloatExperts | GroupExperts


def load_experts(linear: Linear, dtype: torch.dtype) -> StoredExperts | None:
    """A stored linear [experts, N, K]; None if no kernel reads it as it lies. A rank's part of the
    inputs does not lie in one piece, and is copied."""
    if linear.shape[0] > MOST_EXPERTS:
        return None
    linear = replace(linear, tensors={s: t.contiguous() for s, t in linear.tensors.items()})
    product = _product(linear, dtype)
    if product is None:
        return None
    return StoredExperts(product, linear.scheme.input, linear.weight, linear)


def _product(linear: Linear, dtype: torch.dtype) -> Kernels | None:
    """What multiplies with the weights where they lie, of all experts."""
    if isinstance(linear.scheme, W8A8):
        products, (_, outputs, inputs) = native.products(), linear.shape
        if products is None or linear.layout != NZ:
            return None
        scale = linear.tensors["scale"]
        return Int8Experts(products, linear.weight, (outputs, inputs), scale, dtype)
    floats = native.float_products()
    if floats is None:
        return None
    first = stored_weight(linear.matrix(0))  # the others lie behind it, each like it
    if first is None:
        return None
    if not isinstance(linear.scheme, W4A8):
        return FloatExperts(floats, linear.weight, first, dtype)
    shared = linear.tensors["scale"], shift_of(linear.tensors)
    return GroupExperts(floats, linear.weight, first, shared, dtype)
