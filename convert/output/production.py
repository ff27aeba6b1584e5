"""Items through a pool of threads into the staged weight files: what is common to all that writes.

Each byte of the output is written once. A thread takes one item at a time and works through it
piece by piece, while a piece is in its core's cache. So one piece a thread is in memory, whatever
the size of the model; one more thread waits for the disk.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Generic, Protocol, TypeVar

from qwen3_ascend.convert.events import Events
from qwen3_ascend.convert.output.journal import Done
from qwen3_ascend.convert.output.weight_file import WeightFileWriter
from qwen3_ascend.convert.output.writer import OutputWriter
from qwen3_ascend.convert.source.transfer import Cancelled
from qwen3_ascend.files.safetensors import Form
from qwen3_ascend.files.threads import run_all, run_as_they_come

DROP_BYTES = 1 << 28
"""After so many bytes of source the mapped pages are given back."""


class Product(Protocol):
    """Tensors that are made together, of one thing that is read."""

    @property
    def name(self) -> str:
        """Of what is read, as the journal notes it."""

    @property
    def forms(self) -> Mapping[str, Form]:
        """The form of each tensor, by full name; all of them are in one weight file."""

    @property
    def source_bytes(self) -> int:
        """Of what is read."""


P = TypeVar("P", bound=Product)


class Production(ABC, Generic[P]):
    """Items being made. A subclass says how one is made, and what is given back afterwards."""

    def __init__(
        self, items: Sequence[P], writer: OutputWriter, threads: int, events: Events
    ) -> None:
        self.writer, self._threads, self._events = writer, threads, events
        self.items = {item.name: item for item in items}
        plans = [file.plan for file in writer.weight_files.values()]
        self.files = {name: plan.file for plan in plans for name in plan.tensors}
        self._missing = {plan.file: len(plan.tensors) for plan in plans}
        self._stopped = threading.Event()
        self._settling = threading.Lock()
        self.done: dict[str, Done] = {}
        self._read = 0

    @abstractmethod
    def task(self, item: P, file: WeightFileWriter) -> Callable[[], Done]:
        """What a thread will do; asked for in the main thread, which may wait for its source."""

    @abstractmethod
    def drop_pages(self) -> None:
        """Gives the memory of source pages back."""

    def release(self, item: P) -> None:
        """Closes what nobody needs after an item; called by one thread at a time."""

    def take_up(self) -> None:
        """Settles what an earlier run has done, as far as its bytes are what its journal says."""
        for done in self._intact():
            self._settle(done)

    def remaining(self, order: Sequence[P]) -> list[P]:
        """The items that are not done, in an order."""
        return [item for item in order if item.name not in self.done]

    def make(self, items: Sequence[P]) -> None:
        """Makes items, in their order; the first error ends the work."""
        run_as_they_come(map(self._work, items), self._threads, self._stopped)

    def advance(self, nbytes: int) -> None:
        """Before each piece: ends the work if something has failed elsewhere, and gives the memory
        of source pages back in time."""
        if self._stopped.is_set():
            raise Cancelled
        self._read += nbytes  # threads may lose a step of another: it is no exact limit
        if self._read >= DROP_BYTES:
            self._read = 0
            self.drop_pages()

    def file_of(self, item: P) -> str:
        """The weight file that holds an item's tensors."""
        return self.files[next(iter(item.forms))]

    def _work(self, item: P) -> Callable[[], None]:
        file = self.writer.weight_files[self.file_of(item)]
        task = self.task(item, file)
        file.open()

        def work() -> None:
            done = task()
            self.writer.note(done)
            self._settle(done)

        return work

    def _intact(self) -> list[Done]:
        """Items of an earlier run whose bytes are still what its journal says."""

        def check(done: Done) -> Done | None:
            file = self.writer.weight_files[self.file_of(self.items[done.name])]
            return done if file.holds(done) else None

        left = [
            partial(check, done)
            for done in self.writer.left.values()
            if done.name in self.items and set(self.items[done.name].forms) == set(done.blake3)
        ]
        return [done for done in run_all(left, self._threads) if done is not None]

    def _settle(self, done: Done) -> None:
        """Closes what nobody needs any more."""
        item = self.items[done.name]
        file = self.file_of(item)
        with self._settling:
            self.done[done.name] = done
            self._missing[file] -= len(item.forms)
            if not self._missing[file]:
                self.writer.finish_weight_file(file)
            self.release(item)
            self._events.done(item.name, item.source_bytes)
