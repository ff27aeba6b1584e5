"""Equivalent weights: the transforms of a model that a recipe may name."""

from __future__ import annotations

from qwen3_ascend.convert.transforms.base import Transform
from qwen3_ascend.convert.transforms.changes import Change, Changes
from qwen3_ascend.convert.transforms.cle import Cle
from qwen3_ascend.convert.transforms.fitted import AWQ, SMOOTH, FittedTransform
from qwen3_ascend.convert.transforms.rotate import RotateModel

TRANSFORMS: dict[str, Transform] = {
    "cle": Cle(),
    "rotate": RotateModel(),
    "smooth": SMOOTH,
    "awq": AWQ,
}
"""By the name that a recipe says."""

__all__ = [
    "TRANSFORMS",
    "Change",
    "Changes",
    "Cle",
    "FittedTransform",
    "RotateModel",
    "Transform",
]
