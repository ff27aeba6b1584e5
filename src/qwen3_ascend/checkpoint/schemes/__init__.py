"""The registry of schemes: a literal, so that everything a file may contain is on one screen."""

from __future__ import annotations

from qwen3_ascend.checkpoint.schemes.base import Linear
from qwen3_ascend.checkpoint.schemes.bf16 import BF16
from qwen3_ascend.checkpoint.schemes.w8a8 import W8A8
from qwen3_ascend.errors import CheckpointError

SCHEMES: dict[str, type[Linear]] = {
    "bf16": BF16,
    "w8a8": W8A8,
}


def scheme(name: str) -> type[Linear]:
    """The scheme of a name; CheckpointError if this version does not know it."""
    try:
        return SCHEMES[name]
    except KeyError:
        known = ", ".join(SCHEMES)
        raise CheckpointError(f"unknown scheme {name!r}; this version knows {known}") from None


__all__ = ["BF16", "SCHEMES", "W8A8", "Linear", "scheme"]
