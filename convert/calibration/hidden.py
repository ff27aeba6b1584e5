"""The hidden states between two layers: in a file of the staging folder, so that they take no
memory, and so that a killed conversion continues from there."""

from __future__ import annotations

import itertools
import math
import mmap
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from qwen3_ascend.convert.calibration.sealed import DIGITS, is_sealed, write_sealed
from qwen3_ascend.convert.output.weight_file import tensor_bytes

NAME = "hidden-states"

NUMBER_BYTES = 8
"""Of the number of the layer, before the states."""


class HiddenStates:
    """Of each step of a LayerStream, [T, hidden].

    Attributes:
        layer: the layer that they are the input of, counted from 0.
        steps: the states, on the CPU: views of the mapped file.
    """

    def __init__(
        self, staging: Path, shapes: Sequence[tuple[int, int]], dtype: torch.dtype
    ) -> None:
        """No states yet.

        Args:
            staging: the folder.
            shapes: of the states of each step.
            dtype: of all of them.
        """
        self._path, self._shapes, self._dtype = staging / NAME, shapes, dtype
        self.layer, self.steps = 0, list[Tensor]()

    def keep(self, layer: int, states: Iterable[Tensor]) -> None:
        """Puts the inputs of a layer, step by step as they come, in the place of the states."""
        number = memoryview(layer.to_bytes(NUMBER_BYTES, "little"))
        parts = (tensor_bytes(step.cpu()) for step in states)
        write_sealed(self._path, itertools.chain([number], parts))
        self.layer, self.steps = layer, self._mapped()

    def take_up(self, complete: int) -> bool:
        """Goes on from where an earlier run has come to; False if it has left nothing of use.

        Args:
            complete: so many layers are written, each with all its weights. Later states are not
                believed: their layers could be written anew from others.
        """
        if not is_sealed(self._path) or self._path.stat().st_size != self._start + self.nbytes:
            return False
        with self._path.open("rb") as file:
            file.seek(DIGITS)
            layer = int.from_bytes(file.read(NUMBER_BYTES), "little")
        if layer > complete:
            return False
        self.layer, self.steps = layer, self._mapped()
        return True

    @property
    def nbytes(self) -> int:
        """Bytes of the states."""
        return sum(map(math.prod, self._shapes)) * self._dtype.itemsize

    @property
    def _start(self) -> int:
        return DIGITS + NUMBER_BYTES

    def _mapped(self) -> list[Tensor]:
        with self._path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        values = torch.frombuffer(mapped, dtype=self._dtype, offset=self._start)
        sizes = [math.prod(shape) for shape in self._shapes]
        return [
            step.view(shape) for step, shape in zip(values.split(sizes), self._shapes, strict=True)
        ]
