"""Weights that are used before their hash is known, where nothing is copied.

A CPU computes with weights where they lie in the mapped files, so there is no copy to be a little
ahead of (see checked.py), and hashing every byte first would be most of the time to the first
token. They are hashed beside the work instead, and whoever completes something that was computed
from them waits for what is left, for which there is every core by then.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections import deque
from contextlib import suppress

from qwen3_ascend.checkpoint.checked import difference, in_order_of_use
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.errors import CheckpointError, os_errors
from qwen3_ascend.files.threads import available_threads

LEAST_PRIORITY = 19
"""Of a thread, as Unix counts: it takes what the others leave."""


class BackgroundCheck:
    """Hashes the tensors of an open checkpoint while they are used; thread-safe."""

    def __init__(self, reader: CheckpointReader, threads: int | None = None) -> None:
        """Begins, on one thread of the least priority.

        Args:
            reader: of an open checkpoint.
            threads: that hash while somebody waits for the end; default one for each processor.
        """
        self._threads = threads or available_threads()
        self._work = _Work(reader)
        self._running: list[threading.Thread] = []
        weakref.finalize(self, self._work.waiting.clear)  # what nobody waits for is not hashed
        self._start(1, LEAST_PRIORITY)

    def poll(self) -> None:
        """CheckpointError if a tensor has been found whose bytes are not the manifest's."""
        if self._work.error is not None:
            raise self._work.error

    def finish(self) -> None:
        """Waits until every tensor is hashed, on all threads; CheckpointError as in `poll`.

        A wait that was interrupted can be taken up again.
        """
        while self._work.open and self._work.error is None:
            self._running = [thread for thread in self._running if thread.is_alive()]
            if not self._running:  # in a child process, which has none of its parent's threads
                self._work.waiting.extend(self._work.open)
            self._start(min(self._threads - len(self._running), len(self._work.waiting)))
            for thread in self._running:
                thread.join()
        self.poll()

    def _start(self, threads: int, niceness: int = 0) -> None:
        """A thread knows the work and not this object, which may be gone before that is done."""
        for _ in range(threads):
            thread = threading.Thread(target=self._work.run, args=(niceness,), name="hashing")
            thread.start()
            self._running.append(thread)


class _Work:
    """What is left to be hashed, which threads share. Each change of it is one operation of a
    container, so it takes no lock, and a fork can leave none locked."""

    def __init__(self, reader: CheckpointReader) -> None:
        names = in_order_of_use(reader)
        self.waiting, self.open = deque(names), set(names)
        self.error: BaseException | None = None
        self._reader, self._stored = reader, reader.manifest.stored()

    def run(self, niceness: int) -> None:
        """Hashes until nothing waits, or an error is found, or the process is about to end."""
        _step_back(niceness)
        while threading.main_thread().is_alive() and (name := self._next()):
            try:
                self._check(name)
            except BaseException as error:  # raised where somebody asks
                self.error = error

    def _next(self) -> str | None:
        with suppress(IndexError):
            return None if self.error else self.waiting.popleft()
        return None

    @os_errors(CheckpointError)
    def _check(self, name: str) -> None:
        stored = self._stored[name]
        if self._reader.blake3(name, stored.file) != stored.blake3:
            raise difference(self._reader, name)
        self.open.discard(name)


def _step_back(niceness: int) -> None:
    """Lowers the priority of the calling thread; only Linux gives threads one of their own."""
    if sys.platform == "linux" and niceness:
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
