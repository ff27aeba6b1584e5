"""The conversion itself: pieces of every item through a pool of threads, into the staged shards.

Each byte of the source is read once and each byte of the output written once. A thread packs a
piece while it is in its core's cache, writes it, and hashes whatever is due. One thread hashes the
source files meanwhile, which nobody can help it with, and then joins in; a further one only waits
for the disk. Only so many pieces are
in memory at a time as the budget allows, whatever the size of the model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from qwen3_ascend.checkpoint.errors import CheckpointError
from qwen3_ascend.checkpoint.journal import Done
from qwen3_ascend.checkpoint.manifest import (
    FileEntry,
    LinearEntry,
    Manifest,
    SourceRecord,
    StoredTensor,
)
from qwen3_ascend.checkpoint.threads import run_all, workers
from qwen3_ascend.checkpoint.writer import CheckpointWriter
from qwen3_ascend.convert import report
from qwen3_ascend.convert.budget import Budget
from qwen3_ascend.convert.plan import LinearPlan, Plan, TensorPlan
from qwen3_ascend.convert.source import Source
from qwen3_ascend.convert.work import Assembly, make_task
from qwen3_ascend.native import Kernels

Progress = Callable[[str, int], None]
"""Called when an item is done, from any thread but one at a time: its name and source bytes."""

DROP_BYTES = 1 << 28
"""After so many bytes of source the mapped pages are given back."""

Item = LinearPlan | TensorPlan


class Conversion:
    """A plan being carried out."""

    def __init__(
        self,
        plan: Plan,
        source: Source,
        writer: CheckpointWriter,
        budget: Budget,
        kernels: Kernels,
        progress: Progress,
    ) -> None:
        self.plan, self.source, self.writer = plan, source, writer
        self._budget, self._kernels, self._progress = budget, kernels, progress
        self._items = {item.name: item for item in plan.items}
        self._files = {name: shard.file for shard in plan.shards for name in shard.tensors}
        self._missing = {shard.file: len(shard.tensors) for shard in plan.shards}
        self._settling = threading.Lock()
        self.done: dict[str, Done] = {}
        self._read = 0

    def run(self, beside: threading.Thread | None) -> None:
        """Takes up what is left of an earlier run and does the rest, beside another thread."""
        for done in self._intact():
            self._settle(done)
        todo = [item for item in self.plan.items if item.name not in self.done]
        self.source.expect(name for item in todo for name in item.reads)
        with Line(self._budget) as line:
            if beside is not None and self._budget.threads > 1:
                line.make_room_for(beside)
            for item in todo:
                self._submit(item, line)
            line.drain()

    def _intact(self) -> list[Done]:
        """Items of an earlier run whose bytes are still what its journal says."""
        left = [done for name, done in self.writer.left.items() if name in self._items]

        def check(done: Done) -> Done | None:
            names = self._items[done.name].forms
            shard = self.writer.shards[self._files[next(iter(names))]]
            return done if set(names) == set(done.sha256) and shard.holds(done) else None

        tasks = [partial(check, done) for done in left]
        return [done for done in run_all(tasks, self._budget.threads) if done is not None]

    def _submit(self, item: Item, line: Line) -> None:
        task = make_task(item, self.source)
        shard = self.writer.shards[self._files[next(iter(item.forms))]]
        shard.open()
        assembly = Assembly(task, shard, self._kernels, self._finish)
        for index in range(len(task.pieces)):
            line.submit(partial(assembly.process, index))
            self._read += item.source_bytes // len(task.pieces)
            if self._read >= DROP_BYTES:
                self.source.drop_pages()
                self._read = 0

    def _finish(self, done: Done) -> None:
        """Called by the thread that hashed the last byte of an item, while others work on."""
        self.writer.note(done)
        self._settle(done)

    def _settle(self, done: Done) -> None:
        """Closes what nobody needs any more."""
        item = self._items[done.name]
        file = self._files[next(iter(item.forms))]
        with self._settling:
            self.done[done.name] = done
            self._missing[file] -= len(item.forms)
            if not self._missing[file]:
                self.writer.finish_shard(file)
            self.source.release(
                name for i in self.plan.items if i.name not in self.done for name in i.reads
            )
            self._progress(item.name, item.source_bytes)

    def entries(self) -> tuple[dict[str, LinearEntry], dict[str, StoredTensor]]:
        """The manifest's linears and tensors, in the order of the plan."""
        linears: dict[str, LinearEntry] = {}
        tensors: dict[str, StoredTensor] = {}
        for item in self.plan.items:
            done = self.done[item.name]
            stored = {
                name: StoredTensor(dtype, shape, self._files[name], done.sha256[name])
                for name, (dtype, shape) in item.forms.items()
            }
            if isinstance(item, LinearPlan):
                linears[item.name] = _linear_entry(item, stored, done.sqnr_db)
            else:
                tensors |= stored
        return linears, tensors


class Line:
    """A pool of threads with a bounded number of pieces between submission and hash."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._slots = threading.Semaphore(budget.pieces)
        self._pool = workers(budget.threads)
        self._error: BaseException | None = None

    def __enter__(self) -> Line:
        self._submit = self._pool.__enter__().submit
        return self

    def __exit__(self, *error: object) -> None:
        self._error = self._error or CheckpointError("stopped")
        self._pool.__exit__(None, None, None)

    def submit(self, work: Callable[[], int]) -> None:
        """Queues a piece once there is room; raises what an earlier one has raised.

        `work` returns how many pieces, this or others, have now left memory.
        """
        self._slots.acquire()
        if self._error is not None:
            raise self._error
        self._submit(self._run, work)

    def make_room_for(self, thread: threading.Thread) -> None:
        """Lets one of the pool's threads stand still as long as another thread is working."""
        self._submit(self._stand_still, thread)

    def _stand_still(self, thread: threading.Thread) -> None:
        while thread.is_alive() and self._error is None:
            thread.join(0.02)

    def drain(self) -> None:
        """Waits for every piece; raises what one of them has raised."""
        for _ in range(self._budget.pieces):
            self._slots.acquire()
            if self._error is not None:
                raise self._error

    def _run(self, work: Callable[[], int]) -> None:
        if self._error is not None:
            return
        try:
            hashed = work()
        except BaseException as error:
            self._error = self._error or error
            self._slots.release()
        else:
            if hashed:
                self._slots.release(hashed)


def run(
    plan: Plan,
    source: Source,
    carried: Mapping[str, bytes],
    writer: CheckpointWriter,
    budget: Budget,
    kernels: Kernels,
    tool_version: str,
    progress: Progress,
) -> Manifest:
    """Converts everything in the plan and publishes the checkpoint.

    Raises:
        CheckpointError: if a weight is not finite, a source file is damaged or a file cannot be
            written; nothing is published then.
    """
    # The hash of a local file is best taken while its pages are in memory; a hub states it.
    hashing = Background(source.file_entries) if source.provider.store is None else None
    conversion = Conversion(plan, source, writer, budget, kernels, progress)
    conversion.run(hashing)
    files = hashing.result() if hashing else source.file_entries()
    for name, data in carried.items():
        writer.add_file(name, data)
    record = SourceRecord(source.provider.repo, source.provider.revision, files, plan.ignored)
    linears, tensors = conversion.entries()
    shards = {file: shard.entry for file, shard in writer.shards.items()}
    manifest = Manifest(
        tool_version, plan.config, plan.recipe.verbatim, record, linears, tensors,
        shards, writer.files,
    )  # fmt: skip
    writer.add_file("README.md", report.model_card(manifest))
    manifest = replace(manifest, files=writer.files)
    writer.commit(manifest)
    return manifest


class Background(threading.Thread):
    """One call in a thread that cannot keep the process from ending."""

    def __init__(self, call: Callable[[], dict[str, FileEntry]]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self._result: dict[str, FileEntry] = {}
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        """See threading.Thread."""
        try:
            self._result = self._call()
        except BaseException as error:
            self._error = error

    def result(self) -> dict[str, FileEntry]:
        """What the call returned, once it has; or its error."""
        self.join()
        if self._error is not None:
            raise self._error
        return self._result


def _linear_entry(
    item: LinearPlan, stored: Mapping[str, StoredTensor], sqnr_db: float | None
) -> LinearEntry:
    spec = item.spec
    return LinearEntry(
        scheme=item.scheme,
        shape=(spec.outputs, spec.inputs),
        parts=tuple(zip(spec.sources, spec.parts, strict=True)),
        cut=spec.cut,
        layout=item.layout,
        sqnr_db=sqnr_db,
        tensors={name.rpartition(".")[2]: tensor for name, tensor in stored.items()},
    )
