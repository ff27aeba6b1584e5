"""The conversion itself: pieces of every item through a pool of threads, into the staged shards.

Each byte of the source is read once and each byte of the output written once. A thread packs a
piece while it is in its core's cache, writes it, and hashes whatever is due; meanwhile the source
files are hashed beside it, and the disk is kept busy by a further thread. Only so many pieces are
in memory at a time as the budget allows, whatever the size of the model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from queue import SimpleQueue

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
"""Called when an item is done: its name and its bytes in the source."""

DROP_BYTES = 1 << 28
"""After so many bytes of source the mapped pages are given back."""

Item = LinearPlan | TensorPlan


class Conversion:
    """A plan being carried out. All methods run in the thread that made it."""

    def __init__(
        self, plan: Plan, source: Source, writer: CheckpointWriter, budget: Budget, kernels: Kernels
    ) -> None:
        self.plan, self.source, self.writer = plan, source, writer
        self._budget, self._kernels = budget, kernels
        self._items = {item.name: item for item in plan.items}
        self._files = {name: shard.file for shard in plan.shards for name in shard.tensors}
        self._open = {shard.file: len(shard.tensors) for shard in plan.shards}
        self._finished: SimpleQueue[Done] = SimpleQueue()
        self.done: dict[str, Done] = {}

    def run(self, progress: Progress) -> None:
        """Takes up what is left of an earlier run and does the rest."""
        for done in self._intact():
            self._settle(done, progress)
        todo = [item for item in self.plan.items if item.name not in self.done]
        self.source.expect(name for item in todo for name in item.reads)
        with Line(self._budget) as line:
            read = 0
            for item in todo:
                self._submit(item, line)
                read += item.source_bytes
                if read >= DROP_BYTES:
                    self.source.drop_pages()
                    read = 0
                while not self._finished.empty():
                    self._settle(self._finished.get(), progress)
            line.drain()
        while not self._finished.empty():
            self._settle(self._finished.get(), progress)

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
        assembly = Assembly(task, shard, self._kernels, self._note)
        for index in range(len(task.pieces)):
            line.submit(partial(assembly.process, index))

    def _note(self, done: Done) -> None:
        """Called by the thread that hashed the last byte of an item."""
        self.writer.note(done)
        self._finished.put(done)

    def _settle(self, done: Done, progress: Progress) -> None:
        """Closes what nobody needs any more."""
        item = self._items[done.name]
        self.done[done.name] = done
        file = self._files[next(iter(item.forms))]
        self._open[file] -= len(item.forms)
        if not self._open[file]:
            self.writer.finish_shard(file)
        self.source.release(
            name for item in self.plan.items if item.name not in self.done for name in item.reads
        )
        progress(item.name, item.source_bytes)

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
    conversion = Conversion(plan, source, writer, budget, kernels)
    conversion.run(progress)
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
