"""Weights that a source holds as codes of no scheme, as the floats that they stand for.

Only the rows and columns that are asked for are decoded, so that a linear is never in memory as a
whole. Each float is computed in float32 and rounded once to bfloat16, the type of the models that
are published so: what transformers makes of them when it loads one in bfloat16.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from qwen3_ascend.checkpoint.schemes.pieces import Matrix, Ranges

DECODED = torch.bfloat16
"""Type of the floats."""

CHUNK_WEIGHTS = 1 << 20
"""Weights that are decoded together: what it takes is many times what comes of it."""


class DecodedMatrix(Matrix, ABC):
    """A matrix [N, K] of bfloat16 that is made of codes when it is asked for."""

    @abstractmethod
    def decode(self, outputs: slice, inputs: slice) -> Tensor:
        """Some outputs and inputs in float32; both slices have a start and a stop within."""

    @property
    @override
    def dtype(self) -> torch.dtype:
        return DECODED

    @override
    def __getitem__(self, ranges: Ranges, /) -> Tensor:
        outputs, inputs = ranges if isinstance(ranges, tuple) else (ranges, slice(None))
        outputs, inputs = _within(outputs, self.shape[0]), _within(inputs, self.shape[1])
        found = torch.empty(_length(outputs), _length(inputs), dtype=DECODED)
        for rows in found.split(max(1, CHUNK_WEIGHTS // max(1, _length(inputs)))):
            stop = outputs.start + len(rows)
            rows.copy_(self.decode(slice(outputs.start, stop), inputs))
            outputs = slice(stop, outputs.stop)
        return found

    @override
    def float(self) -> Tensor:
        return self[:].float()


@dataclass(frozen=True, eq=False)
class ScaledBlocks(DecodedMatrix):
    """code * scale of its block.

    Attributes:
        codes: float8_e4m3fn [N, K].
        scales: float32 [ceil(N / rows of a block), ceil(K / columns of a block)].
        block: rows and columns that share a scale; blocks at the edges may be smaller.
    """

    codes: Tensor
    scales: Tensor
    block: tuple[int, int]

    @property
    @override
    def shape(self) -> tuple[int, int]:
        rows, columns = self.codes.shape
        return rows, columns

    @override
    def decode(self, outputs: slice, inputs: slice) -> Tensor:
        rows = _numbers(outputs) // self.block[0]
        columns = _numbers(inputs) // self.block[1]
        scales = self.scales[rows].index_select(1, columns)
        return scales.mul_(self.codes[outputs, inputs].float())


def _within(span: slice, length: int) -> slice:
    start, stop, _ = span.indices(length)
    return slice(start, stop)


def _length(span: slice) -> int:
    return max(0, int(span.stop - span.start))


def _numbers(span: slice) -> Tensor:
    return torch.arange(span.start, span.stop)
