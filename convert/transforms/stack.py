"""A linear of changed weights, in pieces: what a scheme sees of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import override

from qwen3_ascend.checkpoint.schemes.pieces import Piece, Stack
from qwen3_ascend.convert.transforms.changes import Change, FindChanges
from qwen3_ascend.native import Kernels

CHUNK_WEIGHTS = 1 << 18
"""Weights that are changed and packed together: as float32 they stay in a core's cache."""


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
    _found: list[Change] = field(default_factory=list)
    _whole: dict[int, Tensor] = field(default_factory=dict)
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
    def outputs(self, piece: Piece, unit: int) -> Iterator[Tensor]:
        """Whatever the parts, in chunks that begin at multiples of the unit."""
        rows = max(1, CHUNK_WEIGHTS // (self.shape[1] * unit)) * unit
        for start in range(piece.start, piece.stop, rows):
            yield self.piece(Piece("outputs", start, min(start + rows, piece.stop)))

    @override
    def is_all(self, dtype: torch.dtype) -> bool:
        return dtype == torch.float32

    @override
    def _outputs(self, piece: Piece) -> list[Tensor]:
        found, row = [], 0
        for index, part in enumerate(self.parts):
            start, stop = max(piece.start - row, 0), min(piece.stop - row, part.shape[0])
            if start < stop:
                found.append(self._rows(index, start, stop))
            row += part.shape[0]
        return found

    def _change(self, index: int) -> Change:
        with self._lock:
            if not self._found:
                self._found.extend(self.find())
        return self._found[index]

    def _rows(self, index: int, start: int, stop: int) -> Tensor:
        """Outputs of a part, with as many around them as have to be known together."""
        change, part = self._change(index), self.parts[index]
        block = change.block
        first, last = start // block * block, -(-stop // block) * block
        if last - first >= part.shape[0]:
            return self._all(index)[start:stop]
        rows = change.weight(part[first:last], first, self.kernels)
        return rows[start - first : stop - first]

    def _all(self, index: int) -> Tensor:
        change = self._change(index)
        with self._lock:
            if index not in self._whole:
                part = self.parts[index]
                weight = part if isinstance(part, Tensor) else part.float()
                self._whole[index] = change.weight(weight, kernels=self.kernels)
            return self._whole[index]
