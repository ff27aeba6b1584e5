"""A linear in pieces: how it is packed and measured without ever being in memory as a whole.

A piece is a range of outputs, or of inputs, chosen so that what it becomes is one contiguous range
of the stored weight. Pieces are therefore packed in any order by any thread and written where they
belong; the bytes do not depend on how the linear was divided.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, get_args

import torch
from torch import Tensor

from qwen3_ascend.checkpoint.layout import Cut, Place
from qwen3_ascend.files.safetensors import Form
from qwen3_ascend.native import Rows
from qwen3_ascend.native.kernels import lane_sums

PIECE_BYTES = 1 << 21
"""Stored bytes of a piece: with its source still within a core's share of the cache."""

NARROW = 8
"""Bytes that a weight counts for in a piece whose codes are narrower than one: torch works on them,
and its temporaries are many times as large. With larger pieces the allocator kept twice as much."""


@dataclass(frozen=True)
class Piece:
    """Outputs or inputs [start, stop) of one logical [N, K] matrix of a weight.

    Attributes:
        axis: which of the two.
        start, stop: the range.
        matrix: which matrix of a weight with batch axes, counted in storage order.
    """

    axis: Cut
    start: int
    stop: int
    matrix: int = 0

    def shape(self, matrix: tuple[int, int]) -> tuple[int, int]:
        """(N, K) of the piece of a matrix (N, K)."""
        count, (outputs, inputs) = self.stop - self.start, matrix
        return (count, inputs) if self.axis == "outputs" else (outputs, count)


@dataclass(frozen=True)
class Sums:
    """Error sums, float64: of each output of a piece of outputs, of each input of one of inputs.

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
        tensors: the piece of each stored tensor, by suffix.
        sums: its errors; None if every weight is kept exactly.
    """

    tensors: Mapping[str, Tensor]
    sums: Sums | None


Ranges = slice | tuple[slice, slice]
"""Rows of a matrix, or rows and columns."""


class Matrix(Protocol):
    """A float matrix that is asked for ranges of its rows and columns: a tensor, or what makes them
    of something else when they are asked for."""

    @property
    def shape(self) -> Sequence[int]:
        """(rows, columns)."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the elements."""

    def __getitem__(self, ranges: Ranges, /) -> Tensor:
        """The elements of the ranges."""

    def float(self) -> Tensor:
        """All elements in float32."""


@dataclass(frozen=True)
class Stack:
    """Float matrices [N_i, K] that form one [N, K] when stacked; the stack is never made."""

    parts: tuple[Matrix, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    def starts(self) -> Iterator[tuple[int, Matrix]]:
        """Each part with the row of the stack at which it begins."""
        row = 0
        for part in self.parts:
            yield row, part
            row += part.shape[0]

    def piece(self, piece: Piece) -> Tensor:
        """A piece as one matrix: a view if it lies in one part, else a copy."""
        if piece.axis == "inputs":
            found = [part[:, piece.start : piece.stop] for part in self.parts]
        else:
            found = self._outputs(piece)
        return found[0] if len(found) == 1 else torch.cat(found)

    def outputs(self, piece: Piece, unit: int) -> Iterable[Rows]:
        """A piece of outputs as matrices of a multiple of `unit` rows each, but for the last one:
        views of the parts if those end at such multiples, else one copy."""
        found = self._outputs(piece)
        aligned = all(part.shape[0] % unit == 0 for part in found[:-1])
        return map(Rows, found if aligned else [torch.cat(found)])

    def _outputs(self, piece: Piece) -> list[Tensor]:
        return [
            part[max(piece.start - row, 0) : piece.stop - row]
            for row, part in self.starts()
            if piece.start < row + part.shape[0] and row < piece.stop
        ]

    def is_all(self, dtype: torch.dtype) -> bool:
        """Whether every part is of a type."""
        return all(part.dtype == dtype for part in self.parts)


def divide(
    shape: Sequence[int], forms: Mapping[str, Form], places: Mapping[str, Mapping[Cut, Place]]
) -> tuple[Piece, ...]:
    """The pieces of a linear, in the order in which they lie in the stored weight.

    Args:
        shape: logical [*batch, N, K].
        forms: of its stored tensors, by suffix.
        places: where its axes lie in each of them; one that no axis divides does not matter.

    Returns:
        Pieces of about PIECE_BYTES along the outermost axis of the stored weight; whole matrices
        if a stored tensor cannot be told from such a piece.
    """
    *batch, outputs, inputs = shape
    places = {suffix: place for suffix, place in places.items() if place}
    matrices = range(math.prod(batch))
    axis = next((cut for cut in get_args(Cut) if _divides(cut, len(batch), forms, places)), None)
    if axis is None:
        return tuple(Piece("outputs", 0, outputs, matrix) for matrix in matrices)
    length = outputs if axis == "outputs" else inputs
    unit = math.lcm(*(place[axis].unit for place in places.values()))
    stored = sum(form.nbytes for form in forms.values()) // len(matrices)
    weights = outputs * inputs
    # torch works on codes that are narrower than a byte: what it takes is many times as large.
    nbytes = stored if stored >= weights else NARROW * weights
    step = unit * max(1, PIECE_BYTES * length // max(1, nbytes * unit))
    return tuple(
        Piece(axis, start, min(start + step, length), matrix)
        for matrix in matrices
        for start in range(0, length, step)
    )


def _divides(
    cut: Cut,
    batch: int,
    forms: Mapping[str, Form],
    places: Mapping[str, Mapping[Cut, Place]],
) -> bool:
    """Whether a piece along an axis determines a part of every stored tensor, which is contiguous
    in the weight."""
    everywhere = all(cut in place for place in places.values())
    return everywhere and len(forms["weight"].shape) + places["weight"][cut].axis == batch


def measured(source: Tensor, decoded: Tensor, axis: Cut) -> Sums:
    """Errors of float matrices [R, C] along the axis that the pieces keep whole.

    The order of summation is fixed, so that every machine and every division finds the same sums.
    """
    exact = source.double()
    noise = (exact - decoded.double()).square_()
    signal = exact.square_()
    if axis == "inputs":
        signal, noise = signal.t().contiguous(), noise.t().contiguous()
    return Sums(lane_sums(signal), lane_sums(noise))


def sqnr_db(sums: Sequence[Sums]) -> float | None:
    """Signal to quantization noise, 10 log10(sum w^2 / sum (w - w')^2), in decibels.

    The sums, in the order of the pieces, are added up one after the other, so that neither the
    division nor the processor can show; the figure is rounded to 0.01. None if every weight is
    equal.
    """
    signal, noise = _total([item.signal for item in sums]), _total([item.noise for item in sums])
    if noise == 0.0 or signal == 0.0:  # a weight of zeros is kept exactly
        return None
    return round(10 * math.log10(signal / noise), 2)


def _total(sums: Sequence[Tensor]) -> float:
    """The last of the partial sums, which depend on each other: nothing can reorder them."""
    return float(torch.cat([*sums]).cumsum(0)[-1]) if sums else 0.0
