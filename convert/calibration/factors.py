"""The changes that calibration has found, as they are kept: in the staging folder for a killed
conversion, and beside the weights for `verify --against`.

They are kept, not found again, because that would take the data, the device and the whole pass, and
gives other last bits on another processor.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from qwen3_ascend.convert.transforms.changes import Changes, Replace, Scale
from qwen3_ascend.errors import CheckpointError

FACTORS_NAME = "qwen3_ascend_factors.safetensors"
"""The file beside the weights."""

GAIN = "gain"
"""The end of the name of a norm's new gain; that of factors is the axis that they belong to."""


def to_tensors(changes: Changes) -> dict[str, Tensor]:
    """Scales and gains by names such as "model.layers.0.mlp.up_proj.1.outputs", in their order."""
    return {
        f"{name}.{number}.{GAIN if isinstance(step, Replace) else step.axis}": _values(step)
        for name, change in changes.of.items()
        for number, step in enumerate(change.steps)
    }


def from_tensors(tensors: Mapping[str, Tensor], where: str) -> Changes:
    """The inverse.

    Raises:
        CheckpointError: if a name is none of ours.
    """
    changes = Changes()
    keys = [(*key.rsplit(".", 2), key) for key in tensors]
    for name, _, kind, key in sorted(keys, key=lambda parts: (parts[0], int(parts[1]))):
        if kind == GAIN:
            changes = changes.then(name, Replace(tensors[key]))
        elif kind in ("outputs", "inputs"):
            changes = changes.then(name, Scale(kind, tensors[key]))
        else:
            raise CheckpointError(f"{where} holds {key}, which is no factor; convert again")
    return changes
