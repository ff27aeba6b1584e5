"""Which sequences run in the next step. Host only: no torch, no device.

A sequence's blocks are reserved for its whole possible length when it is admitted, so a running
sequence never has to be put back. Prompts go first, one at a time and in chunks; then all running
sequences decode as one batch.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from qwen3_ascend.runtime.engine.blocks import BlockAllocator
from qwen3_ascend.runtime.engine.request import Request


@dataclass(frozen=True)
class Prefill:
    """Compute the next `length` prompt tokens of one sequence."""

    sequence: Request
    length: int

    @property
    def completes(self) -> bool:
        """Whether the prompt is computed after this, so that a token can be chosen."""
        return self.sequence.computed + self.length == len(self.sequence.tokens)


@dataclass(frozen=True)
class Decode:
    """Compute the newest token of each of these sequences."""

    sequences: tuple[Request, ...]


class Scheduler:
    """Admits, chooses and retires sequences."""

    def __init__(self, allocator: BlockAllocator, max_batch: int, prefill_chunk: int) -> None:
        self.allocator = allocator
        self.max_batch, self.prefill_chunk = max_batch, prefill_chunk
        self._waiting: deque[Request] = deque()
        self._prefilling: Request | None = None
        self._running: list[Request] = []

    @property
    def busy(self) -> bool:
        """Whether any sequence is not finished."""
        return bool(self._waiting or self._prefilling or self._running)

    def add(self, sequence: Request) -> None:
        """Queues a sequence."""
        self._waiting.append(sequence)

    def next(self) -> Prefill | Decode:
        """What to compute now; only while `busy`."""
        if self._prefilling is None:
            self._prefilling = self._admit()
        if self._prefilling is not None:
            left = len(self._prefilling.tokens) - self._prefilling.computed
            return Prefill(self._prefilling, min(left, self.prefill_chunk))
        return Decode(tuple(self._running))

    def _admit(self) -> Request | None:
        if not self._waiting or len(self._running) >= self.max_batch:
            return None
        if not self.allocator.can_reserve(self._waiting[0].max_length):
            return None
        sequence = self._waiting.popleft()
        blocks = self.allocator.reserve(sequence.number, sequence.max_length)
        sequence.block_table.extend(blocks)
        return sequence

    def prefilled(self, sequence: Request) -> None:
        """Moves a sequence whose prompt is computed to the running ones."""
        assert sequence is self._prefilling
        self._prefilling = None
        self._running.append(sequence)

    def retire(self, sequence: Request) -> None:
        """Forgets a finished or abandoned sequence and frees its blocks."""
        if sequence is self._prefilling:
            self._prefilling = None
        self._running = [other for other in self._running if other is not sequence]
        self._waiting = deque(other for other in self._waiting if other is not sequence)
        self.allocator.release(sequence.number)
        if not self.busy:
            self.allocator.check_integrity()
