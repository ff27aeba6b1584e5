"""bf16: the weight as it is, laid out for the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from qwen3_ascend.checkpoint.layout import (
    ND,
    ROW_BLOCK,
    Layout,
    nz_columns,
    nz_shape,
)
from qwen3_ascend.checkpoint.schemes.base import (
    Linear,
    LinearShape,
    StoredForm,
    add_bias,
    bias_form,
    row_slices,
    with_bias,
)
from qwen3_ascend.checkpoint.schemes.pieces import (
    Packed,
    Piece,
    Stack,
    Sums,
    cut,
    measured,
)
from qwen3_ascend.files.safetensors import tensor_nbytes
from qwen3_ascend.native import Kernels


@dataclass(frozen=True)
class BF16(Linear):
    """weight: bfloat16, FRACTAL_NZ of [N, K] (F.linear sees it through a transposed view)."""

    scheme: ClassVar[str] = "bf16"
    bits: ClassVar[int] = 16

    @classmethod
    def default_layout(cls) -> Layout:
        """NZ of [N, K] in strips of 16."""
        return Layout("nz", "NK", nz_columns(torch.bfloat16.itemsize))

    @classmethod
    def stored(cls, shape: LinearShape, layout: Layout, bias: bool) -> dict[str, StoredForm]:
        """See Linear.stored."""
        return {
            "weight": (torch.bfloat16, layout.storage_shape(*shape)),
            **bias_form(shape, bias),
        }

    @classmethod
    def pieces(cls, shape: LinearShape, layout: Layout) -> tuple[Piece, ...]:
        """See Linear.pieces: strips of columns for NZ of [N, K], rows for a plain layout."""
        outputs, inputs = shape
        if layout == cls.default_layout():
            strip = nz_shape(shape, layout.c0)[1:]
            return cut("columns", inputs, layout.c0, tensor_nbytes(torch.bfloat16, strip))
        if layout.format == "nd":
            return cut("rows", outputs, 1, tensor_nbytes(torch.bfloat16, (inputs,)))
        return (Piece("rows", 0, outputs),)

    @classmethod
    def pack(cls, source: Stack, piece: Piece, layout: Layout, kernels: Kernels) -> Packed:
        """See Linear.pack: rounds to bfloat16, which is exact for a bfloat16 source."""
        if piece.axis == "columns":
            weight = _pack_strips(source, piece, kernels)
            start = piece.start // layout.c0 * weight[0].nbytes
        else:
            matrix = source.cut(piece).to(torch.bfloat16)
            kernels.check_finite(matrix)
            weight = layout.pack(matrix)
            start = tensor_nbytes(torch.bfloat16, (piece.start, source.shape[1]))
        sums = _errors(source, piece, weight, layout)
        return Packed({"weight": (start, weight)}, sums)

    def errors(self, source: Stack, piece: Piece, kernels: Kernels) -> Sums | None:
        """See Linear.errors; None only if the stored weights are the source's, bit by bit."""
        if piece.axis == "columns":
            unit = self.layout.c0
            return _errors(source, piece, self.weight[piece.start // unit : -(-piece.stop // unit)],
                           self.layout, trusted=False)  # fmt: skip
        rows = self.matrix()[piece.start : piece.stop]
        return _errors(source, piece, rows, ND, trusted=False)

    @classmethod
    def from_tensors(
        cls, shape: LinearShape, layout: Layout, tensors: Mapping[str, Tensor]
    ) -> Self:
        """See Linear.from_tensors."""
        return cls(shape, layout, tensors["weight"], tensors.get("bias"))

    def tensors(self) -> dict[str, Tensor]:
        """See Linear.tensors."""
        return with_bias({"weight": self.weight}, self.bias)

    def matrix(self) -> Tensor:
        """The weight in plain order, bfloat16 [N, K]."""
        return self.layout.unpack(self.weight, *self.shape)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """See Linear.blocks."""
        matrix = self.matrix()
        for rows in row_slices(self.shape[0]):
            yield rows, matrix[rows].float()

    def reference(self, x: Tensor) -> Tensor:
        """float32 product of x and the stored weight."""
        return add_bias(x.float() @ self.dequantize().t(), self.bias)


def _pack_strips(source: Stack, piece: Piece, kernels: Kernels) -> Tensor:
    """Columns of a stack in FRACTAL_NZ of [N, K]: bfloat16 [C1, N1, 16, 16], padding zero."""
    outputs, _ = source.shape
    columns = slice(piece.start, piece.stop)
    shape = nz_shape((outputs, piece.stop - piece.start), nz_columns(torch.bfloat16.itemsize))
    strips = torch.empty(shape, dtype=torch.bfloat16)
    parts = [*source.starts()]
    if any(row % ROW_BLOCK for row, _ in parts):
        parts = [(0, source.cut(piece))]
        columns = slice(None)
    for row, part in parts:
        blocks = slice(row // ROW_BLOCK, -(-(row + part.shape[0]) // ROW_BLOCK))
        kernels.pack_nz_rows(part[:, columns], strips[:, blocks])
    return strips


def _errors(
    source: Stack, piece: Piece, weight: Tensor, layout: Layout, trusted: bool = True
) -> Sums | None:
    """Errors of a packed piece. What was just packed from bfloat16 is trusted to equal it."""
    exact = source.is_all(torch.bfloat16)
    if exact and trusted:
        return None
    matrix = source.cut(piece)
    decoded = layout.unpack(weight, *matrix.shape)
    if exact and torch.equal(matrix.view(torch.int16), decoded.view(torch.int16)):
        return None
    return measured(matrix, decoded, piece.axis)
