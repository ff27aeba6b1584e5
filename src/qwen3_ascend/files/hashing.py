"""BLAKE3 of bytes and files: the hash of everything that this project writes itself.

A core hashes several gigabytes a second this way, faster than it can pack or read them, so nothing
has to be arranged around hashing. SHA-256 is used only where a hub states it.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from blake3 import blake3

from qwen3_ascend.errors import CheckpointError

HASH_BLOCK = 1 << 20
"""Bytes read at a time, which stay in a core's cache. Read, not mapped: a page fault costs more
than the copy, and a file that is cut meanwhile is an error instead of a signal."""


def bytes_blake3(data: bytes | memoryview) -> str:
    """BLAKE3 of bytes in memory, in 64 hexadecimal digits."""
    return blake3(data).hexdigest()


def file_blake3(path: Path) -> str:
    """BLAKE3 of a file, streamed."""
    return range_blake3(path, 0, path.stat().st_size)


def range_blake3(path: Path, start: int, stop: int) -> str:
    """BLAKE3 of the bytes [start, stop) of a file; CheckpointError if it ends before."""
    digest = blake3()
    buffer = memoryview(bytearray(min(HASH_BLOCK, max(stop - start, 0))))
    with path.open("rb", buffering=0) as file:
        while start < stop:
            count = os.preadv(file.fileno(), [buffer[: stop - start]], start)
            if not count:
                raise CheckpointError(f"{path} became shorter while it was read")
            digest.update(buffer[:count])
            start += count
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, to be held against what a hub states."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()
