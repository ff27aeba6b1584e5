"""The hidden states between two layers, kept so that a killed conversion continues from there."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from torch import Tensor

from qwen3_ascend.convert.calibration.sealed import DIGITS, is_sealed, write_sealed
from qwen3_ascend.convert.output.weight_file import tensor_bytes

NAME = "hidden-states"


class HiddenStates:
    """Of each step of a LayerStream, [T, hidden]: in memory, and in a file of the staging folder.

    Attributes:
        layer: the layer that they are the input of, counted from 0.
        steps: the states, on the backend's device.
    """

    def __init__(self, staging: Path, steps: list[Tensor]) -> None:
        """The states before the first layer."""
        self._path, self.steps, self.layer = staging / NAME, steps, 0

    def advance(self) -> None:
        """Notes that the states are the inputs of the next layer now."""
        self.layer += 1
        number = memoryview(self.layer.to_bytes(8, "little"))
        states = (tensor_bytes(step.cpu()) for step in self.steps)
        write_sealed(self._path, itertools.chain([number], states))

    def take_up(self, complete: int) -> None:
        """Goes on from where an earlier run has come to.

        Args:
            complete: so many layers are written, each with all its weights. Later states are not
                believed: their layers could be written anew from others.
        """
        if not is_sealed(self._path) or self._path.stat().st_size != DIGITS + 8 + self.nbytes:
            return
        with self._path.open("rb") as file:
            file.seek(DIGITS)
            layer = int.from_bytes(file.read(8), "little")
            if not 0 < layer <= complete:
                return
            for step in self.steps:
                read = torch.empty_like(step, device="cpu")
                file.readinto(tensor_bytes(read))
                step.copy_(read)
        self.layer = layer

    @property
    def nbytes(self) -> int:
        """Bytes of the states."""
        return sum(step.numel() * step.element_size() for step in self.steps)
