"""The one thread that computes, and how the event loop speaks with it."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress

from qwen3_ascend.runtime.answer import Answer, Piece, Score, Work
from qwen3_ascend.runtime.llm import LLM
from qwen3_ascend.runtime.serving.refusal import Refusal

Update = tuple[int, Piece] | Refusal | None
"""What an answer has got, with its place among the answers; why nothing more comes; or None: a
score has ended."""


class Job:
    """The answers and scores that one client waits for; made and read on the event loop.

    What is not read yet is held: at most all that the answers will ever be, which the context of
    the model bounds.
    """

    def __init__(self, answers: Sequence[Answer], scores: Sequence[Score]) -> None:
        self.work: list[Work] = [*scores, *answers]
        self._places: dict[Work, int] = {answer: at for at, answer in enumerate(answers)}
        self._open = len(answers)
        self._open_scores = len(scores)
        self._updates: asyncio.Queue[Update] = asyncio.Queue()
        self._early: deque[tuple[int, Piece]] = deque()
        self._loop = asyncio.get_running_loop()

    def tell(self, moved: Sequence[Work]) -> None:
        """Passes on what some of the work has got; from the thread that computes."""
        updates: list[Update] = []
        for work in moved:
            if isinstance(work, Answer):
                updates.append((self._places[work], work.news()))
            elif work.finish_reason:
                updates.append(None)
        self._put(updates)

    def fail(self, refusal: Refusal) -> None:
        """Tells that nothing more comes; from any thread."""
        self._put([refusal])

    async def scored(self) -> None:
        """Waits until all scores have ended; the answers may go on meanwhile.

        Raises:
            Refusal: if that will never be.
        """
        while self._open_scores:
            update = await self._next()
            if update is not None:
                self._early.append(update)

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """What the answers get, each with its place among them, until the last has ended.

        Raises:
            Refusal: if nothing more comes.
        """
        await self.scored()
        while self._open:
            place, piece = self._early.popleft() if self._early else await self._next_piece()
            self._open -= piece.finish_reason is not None
            yield place, piece

    async def _next_piece(self) -> tuple[int, Piece]:
        update = await self._next()
        assert update is not None, "all scores have ended"
        return update

    async def _next(self) -> tuple[int, Piece] | None:
        update = await self._updates.get()
        if isinstance(update, Refusal):
            raise update
        if update is None:
            self._open_scores -= 1
        return update

    def _put(self, updates: Sequence[Update]) -> None:
        if updates:
            with suppress(RuntimeError):  # the event loop has ended, and the client with it
                self._loop.call_soon_threadsafe(self._take, updates)

    def _take(self, updates: Sequence[Update]) -> None:
        for update in updates:
            self._updates.put_nowait(update)


class EngineLoop:
    """Computes what others submit. The thread that calls `run` owns the LLM meanwhile, since a
    device's streams belong to a thread; everything else may be called from any thread."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of what follows
        self._jobs: dict[Work, Job] = {}
        self._end: str | None = None

    def check(self) -> None:
        """Raises a Refusal that says why, if nothing is computed any more."""
        if self._end is not None:
            raise Refusal(503, self._end)

    def submit(self, job: Job) -> None:
        """Lets a job run beside all others.

        Raises:
            Refusal: if nothing is computed any more.
        """
        with self._lock:
            self.check()
            self._jobs |= dict.fromkeys(job.work, job)
            self._orders.put(lambda: self._llm.submit(job.work))

    def abort(self, job: Job) -> None:
        """Ends what is left of a job, and frees what it holds."""
        with self._lock:
            left = [work for work in job.work if self._jobs.pop(work, None)]
            if left:
                self._orders.put(lambda: self._llm.abort(left))

    def close(self, reason: str) -> None:
        """Ends all jobs, and `run` after the step that it is in."""
        self._finish(reason)
        self._orders.put(None)

    def run(self) -> None:
        """Computes until `close`. What goes wrong meanwhile ends all jobs, and is raised."""
        try:
            while self._obey():
                if self._llm.busy:
                    self._tell(self._llm.step())
        except BaseException as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            self._finish(f"the engine has failed, restart the server: {reason}")
            raise
        self._llm.abort(self._llm.open)

    def _obey(self) -> bool:
        """Does what has been asked for, and waits for it where nothing is to be computed; False
        once that was to end."""
        while not (self._orders.empty() and self._llm.busy):
            order = self._orders.get()
            if order is None:
                return False
            order()
        return True

    def _tell(self, moved: Sequence[Work]) -> None:
        of_job: defaultdict[Job, list[Work]] = defaultdict(list)
        with self._lock:
            for work in moved:
                if (job := self._jobs.get(work)) is not None:
                    of_job[job].append(work)
                    if work.finish_reason:
                        del self._jobs[work]
        for job, its in of_job.items():
            job.tell(its)

    def _finish(self, reason: str) -> None:
        with self._lock:
            self._end = self._end or reason
            jobs, self._jobs = set(self._jobs.values()), {}
        for job in jobs:
            job.fail(Refusal(503, reason))
