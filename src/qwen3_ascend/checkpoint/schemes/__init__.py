"""The registry of schemes: a literal, so that everything a file may contain is on one screen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from qwen3_ascend.checkpoint.schemes.base import Codes, Input, InputRange, Scheme
from qwen3_ascend.checkpoint.schemes.bf16 import BF16
from qwen3_ascend.checkpoint.schemes.w4a8 import W4A8
from qwen3_ascend.checkpoint.schemes.w4a16 import W4A16
from qwen3_ascend.checkpoint.schemes.w8a8 import W8A8
from qwen3_ascend.checkpoint.schemes.w8a8_static import W8A8Static
from qwen3_ascend.checkpoint.schemes.w8a16 import W8A16
from qwen3_ascend.errors import CheckpointError
from qwen3_ascend.files.json_file import typed

SCHEMES: dict[str, type[Scheme]] = {
    "bf16": BF16,
    "w8a8": W8A8,
    "w8a8-static": W8A8Static,
    "w8a16": W8A16,
    "w4a8": W4A8,
    "w4a16": W4A16,
}

EXAMPLES: tuple[Scheme, ...] = (
    *(make() for make in SCHEMES.values()),
    W4A16(64),
    W4A16(32),
    W4A16(128, zero_points=True),
)
"""One of every kind, for whoever examines kernels; w4a16 with each group, of which 32 has another
layout, and with zero points."""


def make_scheme(name: str, parameters: Mapping[str, Any]) -> Scheme:
    """The scheme of a name, with parameters.

    Raises:
        CheckpointError: if this version does not know the scheme or the parameter, or the scheme
            does not take the value.
    """
    if name not in SCHEMES:
        raise CheckpointError(f"unknown scheme {name!r}; this version knows {', '.join(SCHEMES)}")
    # Each scheme is a dataclass, which its base class cannot say.
    known = [field.name for field in fields(SCHEMES[name])]  # type: ignore[arg-type]
    for key in parameters:
        if key not in known:
            listed = ", ".join(known) or "none"
            raise CheckpointError(f"scheme {name} has no parameter {key!r}; it has: {listed}")
    try:
        scheme = typed(dict(parameters), SCHEMES[name], f"scheme {name}")
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    # Made anew, because msgspec leaves a parameter that has its default out of the instance.
    return SCHEMES[name](**scheme.parameters)


__all__ = [
    "BF16",
    "EXAMPLES",
    "SCHEMES",
    "W4A8",
    "W4A16",
    "W8A8",
    "W8A16",
    "Codes",
    "Input",
    "InputRange",
    "Scheme",
    "W8A8Static",
    "make_scheme",
]
