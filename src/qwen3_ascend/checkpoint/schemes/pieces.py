"""A linear in pieces: how it is packed and measured without ever being in memory as a whole.

A piece is a range of rows, or of columns, chosen so that what it becomes is one contiguous range of
each stored tensor. Pieces are therefore packed in any order by any thread, written where they
belong, and hashed in order; the bytes do not depend on how the linear was cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qwen3_ascend.native.fallback import lane_sums

PIECE_BYTES = 1 << 21
"""Stored bytes of a piece: with its source still within a core's share of the cache."""


@dataclass(frozen=True)
class Piece:
    """Rows or columns [start, stop) of a logical [N, K] weight."""

    axis: Literal["rows", "columns"]
    start: int
    stop: int


@dataclass(frozen=True)
class Sums:
    """Error sums, float64: of each row of a piece of rows, of each column of a piece of columns.

    Attributes:
        signal: sums of w^2.
        noise: sums of (w - w')^2, w' being what the stored bytes stand for.
    """

    signal: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Packed:
    """What a piece becomes.

    Attributes:
        tensors: by suffix, the byte at which the piece begins in the stored tensor, and its data.
        sums: its errors; None if every weight is kept exactly.
    """

    tensors: Mapping[str, tuple[int, Tensor]]
    sums: Sums | None

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return sum(tensor.nbytes for _, tensor in self.tensors.values())


@dataclass(frozen=True)
class Stack:
    """Float matrices [N_i, K] that form one [N, K] when stacked; the stack is never made."""

    parts: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    def starts(self) -> Iterator[tuple[int, Tensor]]:
        """Each part with the row of the stack at which it begins."""
        row = 0
        for part in self.parts:
            yield row, part
            row += part.shape[0]

    def cut(self, piece: Piece) -> Tensor:
        """A piece as one matrix: a view if it lies in one part, else a copy."""
        if piece.axis == "columns":
            found = [part[:, piece.start : piece.stop] for part in self.parts]
        else:
            found = self._rows(piece)
        return found[0] if len(found) == 1 else torch.cat(found)

    def rows(self, piece: Piece, unit: int) -> list[Tensor]:
        """Rows of a piece as matrices of a multiple of `unit` rows each, but for the last one:
        views of the parts if those end at such multiples, else one copy."""
        found = self._rows(piece)
        aligned = all(part.shape[0] % unit == 0 for part in found[:-1])
        return found if aligned else [torch.cat(found)]

    def _rows(self, piece: Piece) -> list[Tensor]:
        return [
            part[max(piece.start - row, 0) : piece.stop - row]
            for row, part in self.starts()
            if piece.start < row + part.shape[0] and row < piece.stop
        ]

    def is_all(self, dtype: torch.dtype) -> bool:
        """Whether every part is of a type."""
        return all(part.dtype == dtype for part in self.parts)


def cut(
    axis: Literal["rows", "columns"], length: int, unit: int, unit_bytes: int
) -> tuple[Piece, ...]:
    """Pieces of about PIECE_BYTES along an axis.

    Args:
        axis: along which to cut.
        length: of the axis.
        unit: every piece begins at a multiple of this.
        unit_bytes: stored bytes of that many rows or columns.
    """
    step = unit * max(1, PIECE_BYTES // max(1, unit_bytes))
    return tuple(Piece(axis, start, min(start + step, length)) for start in range(0, length, step))


def measured(source: Tensor, decoded: Tensor, axis: Literal["rows", "columns"]) -> Sums:
    """Errors of float matrices [R, C] along the axis that the pieces keep whole.

    The order of summation is fixed, so that every machine and every cut finds the same sums.
    """
    exact = source.double()
    noise = (exact - decoded.double()).square_()
    signal = exact.square_()
    if axis == "columns":
        signal, noise = signal.t().contiguous(), noise.t().contiguous()
    return Sums(lane_sums(signal), lane_sums(noise))


def sqnr_db(sums: Sequence[Sums]) -> float | None:
    """Signal to quantization noise, 10 log10(sum w^2 / sum (w - w')^2), in decibels.

    The sums, in the order of the pieces, are added up one after the other, so that neither the cut
    nor the processor can show; the figure is rounded to 0.01. None if every weight is equal.
    """
    signal, noise = _total([item.signal for item in sums]), _total([item.noise for item in sums])
    if noise == 0.0 or signal == 0.0:  # a weight of zeros is kept exactly
        return None
    return round(10 * math.log10(signal / noise), 2)


def _total(sums: Sequence[Tensor]) -> float:
    """The last of the partial sums, which depend on each other: nothing can reorder them."""
    return float(torch.cat([*sums]).cumsum(0)[-1]) if sums else 0.0
