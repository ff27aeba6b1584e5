"""w8a16: int8 weights per output channel, activations as they are.

    y = x @ (weight * scale)'

Integers and scales are chosen as those of w8a8, whose scales are exact in bfloat16 too: here they
are stored as that, because npu_weight_quant_batchmatmul wants them in the type of the activations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from qwen3_ascend.checkpoint.layout import Cut, Layout, Place, nz_pack, nz_unpack
from qwen3_ascend.checkpoint.schemes import w8a8
from qwen3_ascend.checkpoint.schemes.base import Codes, Input
from qwen3_ascend.checkpoint.schemes.grid import Grid, IntegerScheme
from qwen3_ascend.checkpoint.schemes.pieces import Packed, Piece, Stack, Sums
from qwen3_ascend.files.safetensors import Form
from qwen3_ascend.native import Kernels

if TYPE_CHECKING:
    from qwen3_ascend.checkpoint.linear import Linear

NZ = w8a8.NZ
"""FRACTAL_NZ of [K, N]: what npu_weight_quant_batchmatmul reads on A2 and A3 with a scale for each
output (aclnnWeightQuantBatchMatmulV2; vllm-ascend's methods/w8a16.py)."""

ROWS = Layout("nd", "KN")
"""[K, N] row by row: what npu_grouped_matmul reads, which takes no FRACTAL_NZ of int8 beside
bfloat16 (ops-transformer's grouped_matmul_def.cpp; ParamsWeightNzDtype of
aclnn_grouped_matmul.cpp)."""

INT8 = w8a8.W8A8()
"""Whose integers and scales these are."""


@dataclass(frozen=True)
class W8A16(IntegerScheme):
    """weight: int8; scale: bfloat16 [*batch, N]."""

    name: ClassVar[str] = "w8a16"
    input: ClassVar[Input] = Input.FLOAT

    @override
    def forms(self, shape: Sequence[int], layout: Layout) -> dict[str, Form]:
        return {
            "weight": Form(torch.int8, layout.storage_shape(shape)),
            "scale": Form(torch.bfloat16, tuple(shape[:-1])),
        }

    @override
    def places(self, layout: Layout) -> dict[str, dict[Cut, Place]]:
        return INT8.places(layout)

    @property
    @override
    def grid(self) -> Grid:
        return INT8.grid

    @override
    def codes(self, integers: Tensor, scales: Tensor) -> Codes:
        return {"weight": integers, "scale": scales[..., 0].to(torch.bfloat16)}

    @override
    def decode(self, codes: Codes) -> Tensor:
        return codes["weight"].float() * codes["scale"].float()[..., None]

    @override
    def product(self, codes: Codes, x: Tensor) -> Tensor:
        return x.float() @ self.decode(codes).t()

    @override
    def pack_piece(self, source: Stack, piece: Piece, layout: Layout, kernels: Kernels) -> Packed:
        """Plain rows are first packed as FRACTAL_NZ, by the kernels for that."""
        packed = INT8.pack_piece(source, piece, _packed_first(layout), kernels)
        weight, scale = packed.tensors["weight"], packed.tensors["scale"].to(torch.bfloat16)
        if layout == ROWS:
            outputs, inputs = piece.shape(source.shape)
            weight = nz_unpack(weight, inputs, outputs)
        return Packed({"weight": weight, "scale": scale}, packed.sums)

    @override
    def errors(self, stored: Linear, source: Stack, piece: Piece, kernels: Kernels) -> Sums | None:
        tensors = {**stored.tensors, "scale": stored.tensors["scale"].float()}
        layout = _packed_first(stored.layout)
        if layout != stored.layout:
            tensors["weight"] = nz_pack(stored.weight)
        same = dataclasses.replace(stored, scheme=INT8, layout=layout, tensors=tensors)
        return INT8.errors(same, source, piece, kernels)

    @override
    def temporary_bytes(self, layout: Layout, source_itemsize: int) -> int:
        moved = 2 * torch.int8.itemsize if layout == ROWS else 0
        return INT8.temporary_bytes(_packed_first(layout), source_itemsize) + moved


def _packed_first(layout: Layout) -> Layout:
    return NZ if layout == ROWS else layout
