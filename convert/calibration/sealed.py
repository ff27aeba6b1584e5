"""Files of the staging folder that a killed conversion takes up again if, and only if, they are
whole: what calibration knows beside the weights that are written already."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from blake3 import blake3

from qwen3_ascend.errors import CheckpointError
from qwen3_ascend.files.hashing import range_blake3

DIGITS = 64


def write_sealed(path: Path, parts: Iterable[memoryview]) -> None:
    """Replaces a file in one step by a hash and the parts.

    Raises:
        CheckpointError: if the disk refuses.
    """
    fresh, digest = path.with_name(f"{path.name}.new"), blake3()
    try:
        with fresh.open("wb") as file:
            file.write(b"0" * DIGITS)
            for part in parts:
                digest.update(part)
                file.write(part)
            file.seek(0)
            file.write(digest.hexdigest().encode())
        os.replace(fresh, path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from error


def is_sealed(path: Path) -> bool:
    """Whether a file is there and as it was written."""
    try:
        with path.open("rb") as file:
            said = file.read(DIGITS).decode(errors="replace")
        return range_blake3(path, DIGITS, path.stat().st_size) == said
    except (OSError, CheckpointError):
        return False
