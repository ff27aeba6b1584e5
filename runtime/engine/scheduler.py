"""What the next step computes. Host only: no torch, no device.

Every running answer gets its next token in every step; what is left of the step's tokens goes to
prompts, in chunks: to the one with the least left first, because that keeps the mean time to the
first token low, but half of it to the oldest one, so that nobody waits for ever. Blocks are given
out as tokens come. When none is left, the request that came last gives its blocks back and is
computed again later, which changes nothing that it says.
"""

from __future__ import annotations

from qwen3_ascend.runtime.engine.batch import Batch, Chunk
from qwen3_ascend.runtime.engine.blocks import BlockPool
from qwen3_ascend.runtime.engine.request import Request

LOGIT_ROWS = 256
"""Rows a step of a request that wants all logits: 150 MB of them with Qwen3's vocabulary."""


class Scheduler:
    """Admits, chooses, puts back and retires requests."""

    def __init__(self, pool: BlockPool, max_batch: int, step_tokens: int) -> None:
        """A scheduler without requests.

        Args:
            pool: of the cache's blocks.
            max_batch: requests that run at a time.
            step_tokens: rows of a step; a step of more answers than that has one row of a prompt.
        """
        self.pool = pool
        self.max_batch, self.step_tokens = max_batch, step_tokens
        self._waiting: list[Request] = []
        self._running: list[Request] = []

    @property
    def busy(self) -> bool:
        """Whether any request is not finished."""
        return bool(self._waiting or self._running)

    @property
    def requests(self) -> tuple[Request, ...]:
        """All requests that are not finished."""
        return (*self._running, *self._waiting)

    def add(self, request: Request) -> None:
        """Queues a request, which fits into the cache by itself."""
        self._waiting.append(request)

    def next(self) -> Batch:
        """The chunks to compute now, at least one; only while `busy`, with nothing in flight."""
        while True:
            self._admit()
            while not self._answers_have_room():
                self._preempt(self._running[-1])
            batch = self._batch()
            if batch.chunks:
                return batch
            # All that run wait for blocks that the others hold: the last one makes room.
            self._preempt(self._running[-1])

    def ahead(self) -> Batch | None:
        """What can be computed after the step in flight, whatever tokens that one chooses; None
        if nothing can, somebody would have to make room, or somebody waits for a beginning that is
        in flight, and can join once that is computed."""
        if len(self._running) < self.max_batch and any(
            self._is_being_computed(request) for request in self._waiting
        ):
            return None
        self._admit()
        if not self._answers_have_room():
            return None
        batch = self._batch()
        return batch if batch.chunks else None

    def issued(self, batch: Batch, chooses_tokens: bool) -> None:
        """Notes that the device has been given a batch, and whether it chooses the tokens too."""
        for chunk in batch.chunks:
            chunk.request.in_flight += chunk.count
            chunk.request.promised += chooses_tokens and chunk.chooses

    def computed(self, batch: Batch) -> None:
        """Notes that a batch has been computed. What a request has given up meanwhile is nobody's
        any more."""
        for chunk in batch.chunks:
            request, before = chunk.request, chunk.request.computed
            if not request.retired:
                request.in_flight -= chunk.count
                request.computed += chunk.count
                self.pool.publish(request, before)

    def retire(self, request: Request) -> None:
        """Forgets a finished or abandoned request and frees its blocks."""
        request.retired = True
        self._running = [other for other in self._running if other is not request]
        self._waiting = [other for other in self._waiting if other is not request]
        self.pool.release(request)

    def _batch(self) -> Batch:
        """The next token of each request that has but one to compute, and chunks of prompts."""
        answers = [Chunk.next_of(request, 1) for request in self._running if request.pending == 1]
        answers.sort(key=_is_known)  # what is carried comes first; else the oldest
        return Batch((*answers, *self._prompts(max(self.step_tokens - len(answers), 1))))

    def _answers_have_room(self) -> bool:
        """Gives each request that has but one token to compute the block for it, the oldest first;
        False if one does not get it."""
        answers = [request for request in self._running if request.pending == 1]
        return all(self.pool.grow(request, request.begun + 1) for request in answers)

    def _prompts(self, budget: int) -> list[Chunk]:
        """Chunks of the running prompts, of `budget` tokens at most."""
        prompts = [one for one in self._running if one.pending > 1]
        chunks: list[Chunk] = []
        reserved = (budget + 1) // 2  # for the oldest, until its turn comes
        for request in sorted(prompts, key=_pending):  # a tie goes to the one that came first
            is_oldest = request is prompts[0]
            most = LOGIT_ROWS if request.wants_logits else self.step_tokens
            wanted = min(budget if is_oldest else budget - reserved, request.pending, most)
            count = min(wanted, self.pool.room(request))
            if count > 0:
                self.pool.grow(request, request.begun + count)
                chunks.append(Chunk.next_of(request, count))
            if count < wanted:
                break  # no block is left for the others either
            budget -= count
            reserved = 0 if is_oldest else reserved
        return chunks

    def _admit(self) -> None:
        """Lets waiting requests run, as long as there is room for all tokens of all that run.

        One whose prompt begins as another's does that is being computed waits for it.
        """
        promised = sum(self.pool.missing(request) for request in self._running)
        for request in [*self._waiting]:
            if len(self._running) >= self.max_batch:
                break
            if self._is_being_computed(request):
                continue
            self.pool.adopt_prefix(request)
            promised += self.pool.missing(request)
            if promised > self.pool.free_blocks:
                self.pool.release(request)
                break
            self._waiting.remove(request)
            self._running.append(request)
            self._running.sort(key=_arrival)  # one that was put back is older than others

    def _is_being_computed(self, request: Request) -> bool:
        """Whether the first block that nobody has yet is part of a running prompt."""
        shareable, pool = self.pool.shareable_blocks(request), self.pool
        index = next((i for i in range(shareable) if not pool.knows(request, i)), shareable)
        if index == shareable:
            return False
        key = pool.key(request, index)
        return any(
            index < pool.shareable_blocks(other) and pool.key(other, index) == key
            for other in self._running
            if other.computed < (index + 1) * pool.block_size
        )

    def _preempt(self, request: Request) -> None:
        """Puts a running request back, to be computed again."""
        self._running.remove(request)
        self.pool.release(request)
        self._waiting.append(request)
        self._waiting.sort(key=_arrival)


def _arrival(request: Request) -> int:
    return request.number


def _pending(request: Request) -> int:
    return request.pending


def _is_known(chunk: Chunk) -> bool:
    return not chunk.is_carried
