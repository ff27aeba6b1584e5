"""A linear of changed weights, in pieces: what a scheme sees of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import override

from qwen3_ascend.checkpoint.schemes.pieces import Piece, Stack
from qwen3_ascend.convert.transforms.changes import FindChanges, Prepared
from qwen3_ascend.native import Kernels, Rows

CHUNK_WEIGHTS = 1 << 18
"""Weights that are packed together: those whose outputs are mixed are float32 in between."""


@dataclass(frozen=True)
class ChangedStack(Stack):
    """Float matrices that are changed as they are asked for: float32.

    A part is changed as a whole, and kept, where a piece cannot be known without the rest: if the
    pieces are inputs, or all outputs are mixed. Else only the outputs of a piece are.

    Attributes:
        find: the change of each part; asked for when the first piece is.
        kernels: to rotate with.
    """

    find: FindChanges
    kernels: Kernels
    _found: list[Prepared] = field(default_factory=list)
    _whole: dict[int, Rows] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    @override
    def starts(self) -> Iterator[tuple[int, Tensor]]:
        row = 0
        for index, part in enumerate(self.parts):
            yield row, self._all(index)
            row += part.shape[0]

    @override
    def piece(self, piece: Piece) -> Tensor:
        if piece.axis == "inputs":
            found = [part[:, piece.start : piece.stop] for _, part in self.starts()]
        else:
            found = self._outputs(piece)
        return found[0] if len(found) == 1 else torch.cat(found)

    @override
    def outputs(self, piece: Piece, unit: int) -> Iterator[Rows]:
        """Whatever the parts, in chunks that begin at multiples of the unit."""
        rows = max(1, CHUNK_WEIGHTS // (self.shape[1] * unit)) * unit
        for start in range(piece.start, piece.stop, rows):
            found = self._rows(Piece("outputs", start, min(start + rows, piece.stop)))
            if all(len(part) % unit == 0 for part in found[:-1]):
                yield from found
            else:
                yield Rows(torch.cat([*map(self._floats, found)]))

    @override
    def is_all(self, dtype: torch.dtype) -> bool:
        return dtype == torch.float32

    @override
    def _outputs(self, piece: Piece) -> list[Tensor]:
        return [*map(self._floats, self._rows(piece))]

    def _rows(self, piece: Piece) -> list[Rows]:
        """The outputs of a piece, from each part that it is in."""
        found, row = [], 0
        for index, part in enumerate(self.parts):
            start, stop = max(piece.start - row, 0), min(piece.stop - row, part.shape[0])
            if start < stop:
                found.append(self._rows_of(index, start, stop))
            row += part.shape[0]
        return found

    def _rows_of(self, index: int, start: int, stop: int) -> Rows:
        """Outputs of a part, made of as many around them as have to be known together."""
        change, part = self._change(index), self.parts[index]
        block = change.block
        first, last = start // block * block, -(-stop // block) * block
        if block > 1 and last - first >= part.shape[0]:
            return self._mixed(index).part(start, stop)
        return change.rows(part[first:last], first, self.kernels).part(start - first, stop - first)

    def _change(self, index: int) -> Prepared:
        with self._lock:
            if not self._found:
                self._found.extend(change.prepared(self.shape[1]) for change in self.find())
        return self._found[index]

    def _mixed(self, index: int) -> Rows:
        """All outputs of a part, kept."""
        change = self._change(index)
        with self._lock:
            if index not in self._whole:
                part = self.parts[index]
                self._whole[index] = change.rows(part[: part.shape[0]], 0, self.kernels)
            return self._whole[index]

    def _all(self, index: int) -> Tensor:
        """All outputs of a part as float32, kept."""
        with self._lock:
            rows = self._mixed(index)
            if rows.steps or rows.source.dtype != torch.float32:
                self._whole[index] = rows = Rows(self._floats(rows))
            return rows.source

    def _floats(self, rows: Rows) -> Tensor:
        """Rows as they have become, float32."""
        out = torch.empty(rows.source.shape, dtype=torch.float32)
        self.kernels.change_rows(rows.source, rows.steps, out)
        return out
