"""A linear in pieces: how it is packed and measured without ever being in memory as a whole.

A piece is a range of rows, or of columns, chosen so that what it becomes is one contiguous range of
each stored tensor. Pieces are therefore packed in any order by any thread, written where they
belong, and hashed in order; the bytes do not depend on how the linear was cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
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
            found = [
                part[max(piece.start - row, 0) : piece.stop - row]
                for row, part in self.starts()
                if piece.start < row + part.shape[0] and row < piece.stop
            ]
        return found[0] if len(found) == 1 else torch.cat(found)

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


def sqnr_db(sums: Iterable[Sums]) -> float | None:
    """Signal to quantization noise, 10 log10(sum w^2 / sum (w - w')^2), in decibels.

    The totals are exactly rounded and the figure is rounded to 0.01, so that no order of summation
    can show. None if every weight is equal.
    """
    found = list(sums)
    signal = math.fsum(value for item in found for value in item.signal.tolist())
    noise = math.fsum(value for item in found for value in item.noise.tolist())
    if noise == 0.0 or signal == 0.0:  # a weight of zeros is kept exactly
        return None
    return round(10 * math.log10(signal / noise), 2)
