"""SHA-256 of bytes and files, and a way of working in which two things are hashed in step.

A core hashes two streams in little more time than one (native/sha256.py). So what hashes is
written as a job, a generator that yields the bytes to be hashed next, and every thread runs two
jobs side by side.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue

from qwen3_ascend.errors import CheckpointError
from qwen3_ascend.files.threads import available_threads, workers
from qwen3_ascend.native.sha256 import Digest, Digests, Stream, digests

HASH_BLOCK = 1 << 18
"""Bytes read at a time, which stay in a core's cache. Read, not mapped: a page fault costs more
than the copy, and a file that is cut meanwhile is an error instead of a signal."""

JOBS_PER_THREAD = 2
"""A third brought nothing that could be measured, for half as much memory again."""

Job = Iterator[Sequence[Stream]]
"""What a job yields has been hashed when it goes on."""


def bytes_sha256(data: bytes | memoryview) -> str:
    """SHA-256 of bytes in memory."""
    return hashlib.sha256(data).hexdigest()


def range_sha256(path: Path, start: int, stop: int) -> str:
    """SHA-256 of the bytes [start, stop) of a file; CheckpointError if it ends before."""
    way = digests()
    digest = way.start()
    for streams in range_job(path, start, stop, digest):
        way.update(streams)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, streamed."""
    return range_sha256(path, 0, path.stat().st_size)


def range_job(path: Path, start: int, stop: int, digest: Digest) -> Job:
    """Appends the bytes [start, stop) of a file to a digest; CheckpointError if it ends before."""
    buffer = memoryview(bytearray(min(HASH_BLOCK, max(stop - start, 0))))
    with path.open("rb", buffering=0) as file:
        while start < stop:
            count = os.preadv(file.fileno(), [buffer[: stop - start]], start)
            if not count:
                raise CheckpointError(f"{path} became shorter while it was read")
            yield [(digest, buffer[:count])]
            start += count


def run_jobs(
    jobs: Iterable[Job],
    way: Digests,
    threads: int | None = None,
    jobs_per_thread: int = JOBS_PER_THREAD,
) -> None:
    """Runs jobs to their ends, in the order in which they come.

    Args:
        jobs: each is asked for in the calling thread when there is nearly room for it, and then
            runs in another.
        way: to hash, which all their digests are of.
        threads: that work at a time; default one for each processor.
        jobs_per_thread: under way at a time.

    Raises:
        BaseException: the first that a job, or asking for one, has raised; no other job goes on.
    """
    count = threads or available_threads()
    line = _Line(count, jobs_per_thread, way)
    with workers(count) as pool:
        for _ in range(count):
            pool.submit(line.work)
        try:
            for job in jobs:
                line.put(job)
        except BaseException as error:
            line.fail(error)
            raise
        finally:
            line.close()
    line.check()


class _Line:
    """Jobs on their way to the threads."""

    def __init__(self, threads: int, jobs_per_thread: int, way: Digests) -> None:
        self._way, self._threads, self._jobs_per_thread = way, threads, jobs_per_thread
        self._queue: SimpleQueue[Job | None] = SimpleQueue()
        # One more for each thread than it works on: it never waits for the next.
        self._slots = threading.Semaphore(threads * (jobs_per_thread + 1))
        self._error: BaseException | None = None

    def put(self, job: Job) -> None:
        """Queues a job once there is room; raises what another one has raised."""
        self._slots.acquire()
        self.check()
        self._queue.put(job)

    def close(self) -> None:
        """No more jobs will come."""
        for _ in range(self._threads):
            self._queue.put(None)

    def fail(self, error: BaseException) -> None:
        """Ends every job."""
        self._error = self._error or error
        self._slots.release()

    def check(self) -> None:
        """Raises the first error."""
        if self._error is not None:
            raise self._error

    def work(self) -> None:
        """What a thread does until there are no more jobs."""
        active: list[Job] = []
        try:
            while self._fill(active) and self._error is None:
                streams: list[Stream] = []
                for job in [*active]:
                    step = next(job, None)
                    if step is None:
                        active.remove(job)
                        self._slots.release()
                    else:
                        streams += step
                self._way.update(streams)
        except BaseException as error:
            self.fail(error)

    def _fill(self, active: list[Job]) -> bool:
        """Takes up as many jobs as there should be; whether there is any."""
        while len(active) < self._jobs_per_thread:
            try:
                job = self._queue.get(block=not active)
            except Empty:
                break
            if job is None:
                self._queue.put(None)  # the end stays the end, also for the next question
                break
            active.append(job)
        return bool(active)
