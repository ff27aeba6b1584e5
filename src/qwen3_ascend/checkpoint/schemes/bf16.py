"""bf16: the weight as it is, laid out for the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from qwen3_ascend.checkpoint.layout import (
    Cut,
    Layout,
    Place,
    nz_columns,
    nz_shape,
)
from qwen3_ascend.checkpoint.schemes.base import TEMPORARY_BYTES, Codes, Input, Scheme
from qwen3_ascend.checkpoint.schemes.pieces import Packed, Piece, Stack, Sums, measured
from qwen3_ascend.files.safetensors import Form
from qwen3_ascend.geometry import ROW_BLOCK
from qwen3_ascend.native import Kernels

if TYPE_CHECKING:
    from qwen3_ascend.checkpoint.linear import Linear

NZ = Layout("nz", "NK", nz_columns(torch.bfloat16.itemsize))
"""FRACTAL_NZ of [N, K] in strips of 16: F.linear sees it through a transposed view."""


@dataclass(frozen=True)
class BF16(Scheme):
    """weight: bfloat16."""

    name: ClassVar[str] = "bf16"
    input: ClassVar[Input] = Input.FLOAT

    @override
    def forms(self, shape: Sequence[int], layout: Layout) -> dict[str, Form]:
        return {"weight": Form(torch.bfloat16, layout.storage_shape(shape))}

    @override
    def places(self, layout: Layout) -> dict[str, dict[Cut, Place]]:
        return {"weight": {"outputs": layout.place("outputs"), "inputs": layout.place("inputs")}}

    @override
    def choose(self, weight: Tensor) -> Codes:
        return {"weight": weight.to(torch.bfloat16)}

    @override
    def decode(self, codes: Codes) -> Tensor:
        return codes["weight"].float()

    @override
    def product(self, codes: Codes, x: Tensor) -> Tensor:
        return x.float() @ self.decode(codes).t()

    @override
    def pack_piece(self, source: Stack, piece: Piece, layout: Layout, kernels: Kernels) -> Packed:
        """Rounds to bfloat16, which is exact for a bfloat16 source."""
        is_exact = source.is_all(torch.bfloat16)
        if piece.axis == "outputs":
            matrix, sums = _rounded(source, piece, kernels)
            return Packed({"weight": layout.pack(matrix)}, sums)
        if layout == NZ:
            weight = _pack_strips(source, piece, kernels)
        else:
            rounded = source.piece(piece).to(torch.bfloat16)
            kernels.check_finite(rounded)
            weight = layout.pack(rounded)
        if is_exact:
            return Packed({"weight": weight}, None)
        matrix = source.piece(piece)
        decoded = layout.unpack(weight, matrix.shape)
        return Packed({"weight": weight}, measured(matrix, decoded, piece.axis))

    @override
    def errors(self, stored: Linear, source: Stack, piece: Piece, kernels: Kernels) -> Sums | None:
        """None only if the stored weights are the source's, bit by bit."""
        matrix, decoded = source.piece(piece), stored.codes()["weight"]
        exact = source.is_all(torch.bfloat16)
        if exact and torch.equal(matrix.view(torch.int16), decoded.view(torch.int16)):
            return None
        return _errors(matrix, decoded, piece, kernels)

    @override
    def temporary_bytes(self, layout: Layout, source_itemsize: int) -> int:
        exact = source_itemsize == torch.bfloat16.itemsize
        return 2 * torch.bfloat16.itemsize if exact else TEMPORARY_BYTES


def _rounded(source: Stack, piece: Piece, kernels: Kernels) -> tuple[Tensor, Sums | None]:
    """Some outputs, bfloat16, and their errors."""
    if source.is_all(torch.bfloat16):
        matrix = source.piece(piece)
        kernels.check_finite(matrix)
        return matrix, None
    count = piece.stop - piece.start
    matrix = torch.empty(count, source.shape[1], dtype=torch.bfloat16)
    sums = Sums(*torch.empty(2, count, dtype=torch.float64))
    row = 0
    for found in source.outputs(piece, 1):
        rows = slice(row, row + len(found))
        outputs = (matrix[rows], sums.signal[rows], sums.noise[rows])
        kernels.round_rows(found.source, *outputs, steps=found.steps)
        row = rows.stop
    return matrix, sums


def _errors(matrix: Tensor, decoded: Tensor, piece: Piece, kernels: Kernels) -> Sums:
    """See `measured`, which finds the same."""
    if piece.axis == "inputs":
        return measured(matrix, decoded, piece.axis)
    sums = Sums(*torch.empty(2, matrix.shape[0], dtype=torch.float64))
    kernels.error_bf16(matrix, decoded.contiguous(), sums.signal, sums.noise)
    return sums


def _pack_strips(source: Stack, piece: Piece, kernels: Kernels) -> Tensor:
    """Inputs of a stack in FRACTAL_NZ of [N, K]: bfloat16 [C1, N1, 16, 16], padding zero."""
    outputs, _ = source.shape
    columns = slice(piece.start, piece.stop)
    strips = torch.empty(nz_shape((outputs, piece.stop - piece.start), NZ.c0), dtype=torch.bfloat16)
    parts = [*source.starts()]
    if any(row % ROW_BLOCK for row, _ in parts):
        parts = [(0, source.piece(piece))]
        columns = slice(None)
    for row, part in parts:
        blocks = slice(row // ROW_BLOCK, -(-(row + part.shape[0]) // ROW_BLOCK))
        kernels.pack_nz_rows(part[:, columns], strips[:, blocks])
    return strips
