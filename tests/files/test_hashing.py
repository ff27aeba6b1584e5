"""BLAKE3 of files, against the package's one-shot form and its published test vector."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from blake3 import blake3

from qwen3_ascend.errors import CheckpointError
from qwen3_ascend.files.hashing import HASH_BLOCK, bytes_blake3, file_blake3, range_blake3


def test_the_published_hash_of_nothing() -> None:
    """From the test vectors of the BLAKE3 team."""
    expected = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    assert bytes_blake3(b"") == expected


@pytest.mark.parametrize("size", [0, 1, HASH_BLOCK, 3 * HASH_BLOCK + 7])
def test_files_and_ranges(size: int, tmp_path: Path) -> None:
    path, data = tmp_path / "file", random.Random(size).randbytes(size)
    path.write_bytes(data)
    assert file_blake3(path) == bytes_blake3(data) == blake3(data).hexdigest()
    start, stop = size // 3, size - size // 5
    assert range_blake3(path, start, stop) == blake3(data[start:stop]).hexdigest()


def test_a_file_that_became_shorter(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 50)
    with pytest.raises(CheckpointError, match="became shorter"):
        range_blake3(path, 0, 100)
