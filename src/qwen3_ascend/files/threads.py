"""A few words around the standard thread pool."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from qwen3_ascend.native.threads import processor_quota

T = TypeVar("T")


def available_threads() -> int:
    """Processors that this process may use, within the quota of a container."""
    has_affinity = hasattr(os, "sched_getaffinity")
    count = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return min(count, processor_quota() or count)


@contextmanager
def workers(threads: int) -> Iterator[ThreadPoolExecutor]:
    """A thread pool in which torch does not start threads of its own; an error drops its queue."""
    torch_threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(torch_threads)


def run_all(tasks: Iterable[Callable[[], T]], threads: int | None = None) -> Iterator[T]:
    """Results of all tasks as they finish; the first error is raised and the rest dropped."""
    with workers(threads or available_threads()) as pool:
        futures: list[Future[T]] = [pool.submit(task) for task in tasks]
        for future in as_completed(futures):
            yield future.result()


def run_as_they_come(
    tasks: Iterable[Callable[[], None]], threads: int, stopped: threading.Event
) -> None:
    """Runs tasks to their ends, in the order in which they come.

    Args:
        tasks: each is asked for in the calling thread when a thread will soon be free for it.
        threads: that work at a time.
        stopped: is set when an error has occurred; a long task looks at it now and then.

    Raises:
        BaseException: the first that a task, or asking for one, has raised; no other task begins.
    """
    room = threading.Semaphore(2 * threads)  # one more for each thread, so that it never waits
    errors: list[BaseException] = []

    def run(task: Callable[[], None]) -> None:
        try:
            if not stopped.is_set():
                task()
        except BaseException as error:
            errors.append(error)
            stopped.set()
        finally:
            room.release()

    with workers(threads) as pool:
        try:
            for task in tasks:
                room.acquire()
                if stopped.is_set():
                    break
                pool.submit(run, task)
            pool.shutdown()
        except BaseException:
            stopped.set()
            raise
    if errors:
        raise errors[0]


@dataclass(frozen=True)
class Crew:
    """Threads that work ahead for others.

    Attributes:
        pool: the threads.
        room: how many results may be under way or waiting, of all who have work done.
    """

    pool: ThreadPoolExecutor
    room: threading.Semaphore


@contextmanager
def crew(threads: int) -> Iterator[Crew]:
    """A crew of so many threads, and with room for as many results."""
    with workers(threads) as pool:
        yield Crew(pool, threading.Semaphore(threads))


class Ahead(Generic[T]):
    """Results of numbered tasks, asked for in their order; the next ones are under way by then, as
    far as there is room. Who made it closes it."""

    def __init__(self, crew: Crew, make: Callable[[int], T], count: int) -> None:
        """Args:
        crew: that works.
        make: the task of a number; it ends soon if the work as a whole ends.
        count: of the tasks.
        """
        self._pool, self._room, self._make, self._count = crew.pool, crew.room, make, count
        self._begun = 0
        self._futures: dict[int, Future[T]] = {}

    def result(self, number: int) -> T:
        """What became of a task; its error if it has failed. Nothing of it stays here."""
        if number == self._begun:  # none is waiting here, so others will make room
            self._room.acquire()
            self._begin()
        while self._begun < self._count and self._room.acquire(blocking=False):
            self._begin()
        try:
            return self._futures[number].result()
        finally:
            del self._futures[number]
            self._room.release()

    def close(self) -> None:
        """Drops what nobody will ask for."""
        while self._futures:
            _, future = self._futures.popitem()
            future.cancel()
            self._room.release()

    def _begin(self) -> None:
        self._futures[self._begun] = self._pool.submit(self._make, self._begun)
        self._begun += 1
