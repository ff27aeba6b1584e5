"""How much is under way at a time, so that memory stays within what the user allows."""

from __future__ import annotations

from dataclasses import dataclass

from qwen3_ascend.errors import RequestError
from qwen3_ascend.files.threads import available_threads

MAX_MEMORY = 2 << 30
"""Bytes beyond the interpreter with torch loaded; mapped source files do not count."""

FIXED_BYTES = 64 << 20
"""Headers, journal and manifest of the largest model."""

THREAD_BYTES = 16 << 20
"""Of each thread: blocks of the torch kernels, and what its allocator keeps."""


@dataclass(frozen=True)
class Budget:
    """What may be under way at a time.

    Attributes:
        threads: that work, each with one piece in memory.
        piece_bytes: memory of the largest piece.
    """

    threads: int
    piece_bytes: int

    @classmethod
    def fit(
        cls, piece_bytes: int, threads: int | None = None, max_memory: int | None = None
    ) -> Budget:
        """The most that fits.

        Args:
            piece_bytes: memory of the largest piece, its source included.
            threads: at most so many; default all processors.
            max_memory: bytes; default MAX_MEMORY.

        Raises:
            RequestError: if not even one thread with one piece fits.
        """
        limit = MAX_MEMORY if max_memory is None else max_memory
        wanted = available_threads() if threads is None else threads
        if wanted < 1:
            raise RequestError(f"{wanted} threads cannot do anything; give at least 1")
        most = (limit - FIXED_BYTES) // (THREAD_BYTES + piece_bytes)
        if most < 1:
            least = FIXED_BYTES + THREAD_BYTES + piece_bytes
            raise RequestError(
                f"{limit} bytes of memory are too little; this model needs {least} "
                f"({-(-least // (1 << 20))}MiB) beyond Python with torch loaded"
            )
        return cls(min(wanted, most), piece_bytes)

    @property
    def working_bytes(self) -> int:
        """Peak private memory beyond the interpreter with torch loaded."""
        return FIXED_BYTES + self.threads * (THREAD_BYTES + self.piece_bytes)
