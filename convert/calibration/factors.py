"""The changes that calibration has found, as they are kept: in the staging folder for a killed
conversion, and beside the weights for `verify --against`.

They are kept, not found again, because that would take the data, the device and the whole pass, and
would give other last bits on another processor.
"""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from qwen3_ascend.checkpoint.layout import Cut
from qwen3_ascend.convert.calibration.sealed import DIGITS, is_sealed, write_sealed
from qwen3_ascend.convert.transforms.changes import Changes, Replace, Scale
from qwen3_ascend.errors import CheckpointError

FACTORS_NAME = "qwen3_ascend_factors.safetensors"
"""The file beside the weights."""

GAIN = "gain"
"""The end of the name of a norm's new gain; that of factors is the axis that they belong to."""


def factors_bytes(changes: Changes) -> bytes:
    """A safetensors file of scales and gains, by names such as
    "model.layers.0.mlp.up_proj.1.outputs" in their order."""
    tensors: dict[str, Tensor] = {}
    for name, change in changes.of.items():
        for number, step in enumerate(change.steps):
            if isinstance(step, Scale):
                tensors[f"{name}.{number}.{step.axis}"] = step.factors.clone()
            else:
                assert isinstance(step, Replace), "calibration finds no rotation"
                tensors[f"{name}.{number}.{GAIN}"] = step.gain.clone()
    return safetensors.torch.save(tensors)


def read_factors(data: bytes, where: str) -> Changes:
    """The inverse of `factors_bytes`.

    Raises:
        CheckpointError: if the bytes are something else.
    """
    try:
        tensors = safetensors.torch.load(data)
        found = sorted((key.split(".")[:-2], int(key.split(".")[-2]), key) for key in tensors)
    except (SafetensorError, ValueError, IndexError) as error:
        raise CheckpointError(f"{where} holds no factors: {error}; convert again") from error
    changes = Changes()
    for parts, _, key in found:
        changes = changes.then(".".join(parts), _step(key.rpartition(".")[2], tensors[key], where))
    return changes


def _step(kind: str, values: Tensor, where: str) -> Scale | Replace:
    if kind == GAIN:
        return Replace(values)
    for axis in get_args(Cut):
        if kind == axis:
            return Scale(axis, values)
    raise CheckpointError(f"{where} holds {kind}, which is no factor; convert again")


class KeptFactors:
    """The factors of each layer in the staging folder."""

    def __init__(self, staging: Path) -> None:
        self._staging = staging

    def keep(self, number: int, changes: Changes) -> None:
        """Notes those of a layer, before the first of its weights is written."""
        write_sealed(self._path(number), [memoryview(factors_bytes(changes))])

    def find(self, number: int) -> Changes | None:
        """Those of a layer as an earlier run has kept them."""
        path = self._path(number)
        if not is_sealed(path):
            return None
        return read_factors(path.read_bytes()[DIGITS:], str(path))

    def _path(self, number: int) -> Path:
        return self._staging / f"factors-{number:05d}"
