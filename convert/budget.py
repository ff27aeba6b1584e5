"""How much is under way at a time, so that memory stays within what the user allows."""

from __future__ import annotations

from dataclasses import dataclass

from qwen3_ascend.errors import OptionError
from qwen3_ascend.files.threads import available_threads

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
        shared_bytes: memory that the threads share, such as what calibration has recorded.
        alone_bytes: memory beside that of what comes before and after their work.
    """

    threads: int
    piece_bytes: int
    shared_bytes: int = 0
    alone_bytes: int = 0

    @classmethod
    def fit(
        cls,
        piece_bytes: int,
        threads: int | None,
        max_memory: int,
        shared_bytes: int = 0,
        alone_bytes: int = 0,
    ) -> Budget:
        """The most that fits.

        Args:
            piece_bytes: memory of the largest piece, its source included.
            threads: at most so many; None for one for each processor.
            max_memory: bytes beyond the interpreter with torch loaded.
            shared_bytes, alone_bytes: see Budget.

        Raises:
            OptionError: if not even one thread with one piece fits.
        """
        wanted = available_threads() if threads is None else threads
        one = cls(1, piece_bytes, shared_bytes, alone_bytes)
        if (least := one.working_bytes) > max_memory:
            raise OptionError(
                f"max_memory: {max_memory} bytes of memory are too little; this model needs "
                f"{least} beyond Python with torch loaded: pass --max-memory "
                f"{-(-least // (1 << 20))}MiB, or more for more threads"
            )
        most = (max_memory - FIXED_BYTES - shared_bytes) // (THREAD_BYTES + piece_bytes)
        return cls(min(wanted, most), piece_bytes, shared_bytes, alone_bytes)

    @property
    def working_bytes(self) -> int:
        """Peak private memory beyond the interpreter with torch loaded."""
        working = self.threads * (THREAD_BYTES + self.piece_bytes)
        return FIXED_BYTES + self.shared_bytes + max(working, self.alone_bytes)
