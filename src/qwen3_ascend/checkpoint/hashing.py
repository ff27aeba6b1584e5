"""SHA-256 of byte ranges of files, in blocks that stay in a core's cache."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from qwen3_ascend.checkpoint.errors import CheckpointError

HASH_BLOCK = 1 << 18
"""Bytes read at a time. Read, not mapped: a page fault costs more than the copy, and a file that
is cut meanwhile is an error instead of a signal. hashlib lets go of the interpreter's lock."""


def bytes_sha256(data: bytes | memoryview) -> str:
    """SHA-256 of bytes in memory."""
    return hashlib.sha256(data).hexdigest()


def range_sha256(path: Path, start: int, stop: int) -> str:
    """SHA-256 of the bytes [start, stop) of a file; CheckpointError if it ends before."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(HASH_BLOCK, max(stop - start, 0))))
    with path.open("rb", buffering=0) as file:
        while start < stop:
            count = os.preadv(file.fileno(), [buffer[: stop - start]], start)
            if not count:
                raise CheckpointError(f"{path} became shorter while it was read")
            digest.update(buffer[:count])
            start += count
    return digest.hexdigest()
