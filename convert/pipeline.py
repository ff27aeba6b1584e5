"""The conversion itself: every item through a pool of threads into the staged weight files.

Each byte of the source is read once for this, and each byte of the output written once. A thread
takes one item at a time and packs, writes and hashes it piece by piece, while a piece is in its
core's cache. So one piece a thread is in memory, whatever the size of the model; one more thread
waits for the disk.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from qwen3_ascend.checkpoint.architecture import LinearSpec
from qwen3_ascend.checkpoint.manifest import LinearEntry, Manifest, SourceRecord, StoredTensor
from qwen3_ascend.convert import report
from qwen3_ascend.convert.budget import Budget
from qwen3_ascend.convert.events import Events
from qwen3_ascend.convert.order import working_order
from qwen3_ascend.convert.output.journal import Done
from qwen3_ascend.convert.output.writer import CheckpointWriter
from qwen3_ascend.convert.plan import Item, Plan
from qwen3_ascend.convert.source import Source
from qwen3_ascend.convert.source.transfer import Cancelled
from qwen3_ascend.convert.work import convert, make_task, stored_blake3
from qwen3_ascend.errors import DamagedSourceError
from qwen3_ascend.files.threads import run_all, run_as_they_come
from qwen3_ascend.native import Kernels

DROP_BYTES = 1 << 28
"""After so many bytes of source the mapped pages are given back."""


class Conversion:
    """A plan being carried out."""

    def __init__(
        self,
        plan: Plan,
        source: Source,
        writer: CheckpointWriter,
        budget: Budget,
        kernels: Kernels,
        hash_source: bool,
        events: Events,
    ) -> None:
        self.plan, self.source, self.writer = plan, source, writer
        self._budget, self._kernels = budget, kernels
        self._hash_source, self._events = hash_source, events
        self._stopped = threading.Event()
        self._order = working_order(plan, source)
        self._items = {item.name: item for item in plan.items}
        self._files = {name: file.file for file in plan.weight_files for name in file.tensors}
        self._missing = {file.file: len(file.tensors) for file in plan.weight_files}
        self._readers = Counter(
            file for item in plan.items for file in source.file_order(item.reads)
        ) + Counter(source.file_order(plan.alike))
        self._settling = threading.Lock()
        self.done: dict[str, Done] = {}
        self._read = 0

    def run(self) -> None:
        """Takes up what is left of an earlier run and does the rest."""
        for done in self._intact():
            self._settle(done)
        todo = [item for item in self._order if item.name not in self.done]
        self.source.expect([*(name for item in todo for name in item.reads), *self.plan.alike])
        run_as_they_come(map(self._task, todo), self._budget.threads, self._stopped)
        for name, stored in self.plan.alike.items():
            self._require_equal(name, stored)

    def _require_equal(self, name: str, stored: str) -> None:
        """Holds a source tensor that is left out against the stored one that takes its place."""
        if stored_blake3(self.source.read(name)) != self.done[stored].blake3[stored]:
            raise DamagedSourceError(
                f"config.json ties {name} to {stored}, but the two differ; download the model, "
                f"and convert that folder: then {name} is kept"
            )

    def _intact(self) -> list[Done]:
        """Items of an earlier run whose bytes are still what its journal says."""

        def check(done: Done) -> Done | None:
            file = self.writer.weight_files[self._file(self._items[done.name])]
            return done if file.holds(done) else None

        left = [
            partial(check, done)
            for done in self.writer.left.values()
            if done.name in self._items and set(self._items[done.name].forms) == set(done.blake3)
        ]
        return [done for done in run_all(left, self._budget.threads) if done is not None]

    def _task(self, item: Item) -> Callable[[], None]:
        """What a thread will do; asked for in the main thread, which may wait for a download."""
        task = make_task(item, self.source)
        file = self.writer.weight_files[self._file(item)]
        file.open()
        advance = partial(self._advance, item.source_bytes // len(task.pieces))

        def work() -> None:
            done = convert(task, file, self._kernels, self._hash_source, advance)
            self.writer.note(done)
            self._settle(done)

        return work

    def _advance(self, nbytes: int) -> None:
        """Before each piece: ends the work if something has failed elsewhere, and gives the memory
        of source pages back in time."""
        if self._stopped.is_set():
            raise Cancelled
        self._read += nbytes  # threads may lose a step of another: it is no exact limit
        if self._read >= DROP_BYTES:
            self._read = 0
            self.source.drop_pages()

    def _settle(self, done: Done) -> None:
        """Closes what nobody needs any more."""
        item = self._items[done.name]
        file = self._file(item)
        with self._settling:
            self.done[done.name] = done
            self._missing[file] -= len(item.forms)
            if not self._missing[file]:
                self.writer.finish_weight_file(file)
            for name in self.source.file_order(item.reads):
                self._readers[name] -= 1
                if not self._readers[name]:
                    self.source.release(name)
            self._events.done(item.name, item.source_bytes)

    def _file(self, item: Item) -> str:
        return self._files[next(iter(item.forms))]

    def source_hashes(self) -> dict[str, str]:
        """BLAKE3 of each source tensor that was read, in the order of the plan."""
        return {
            name: blake3
            for item in self.plan.items
            for name, blake3 in self.done[item.name].source.items()
        }

    def entries(self) -> tuple[dict[str, LinearEntry], dict[str, StoredTensor]]:
        """The manifest's linears and tensors, in the order of the plan."""
        linears: dict[str, LinearEntry] = {}
        tensors: dict[str, StoredTensor] = {}
        for item in self.plan.items:
            done = self.done[item.name]
            stored = {
                name: StoredTensor(form.dtype, form.shape, self._files[name], done.blake3[name])
                for name, form in item.forms.items()
            }
            if isinstance(item.spec, LinearSpec):
                linears[item.name] = _linear_entry(item, item.spec, stored, done.sqnr_db)
            else:
                tensors |= stored
        return linears, tensors


def run(
    plan: Plan,
    source: Source,
    carried: Mapping[str, bytes],
    writer: CheckpointWriter,
    budget: Budget,
    kernels: Kernels,
    tool_version: str,
    hash_source: bool,
    events: Events,
) -> Manifest:
    """Converts everything in the plan and publishes the checkpoint.

    Raises:
        CheckpointError: if a weight is not finite, a source file is damaged or a file cannot be
            written; nothing is published then.
    """
    for name, data in carried.items():
        writer.add_file(name, data)
    conversion = Conversion(plan, source, writer, budget, kernels, hash_source, events)
    conversion.run()
    record = SourceRecord(
        source.provider.repo, source.hub, source.provider.revision, source.file_entries(),
        conversion.source_hashes(), plan.ignored, source.quantization.format,
    )  # fmt: skip
    linears, tensors = conversion.entries()
    weight_files = {file: weights.entry for file, weights in writer.weight_files.items()}
    manifest = Manifest(
        tool_version, plan.target.name, plan.config, plan.recipe.verbatim, record, linears, tensors,
        weight_files, writer.files,
    )  # fmt: skip
    writer.add_file(report.MODEL_CARD_NAME, report.model_card(manifest))
    manifest = replace(manifest, files=writer.files)
    writer.commit(manifest)
    return manifest


def _linear_entry(
    item: Item, spec: LinearSpec, stored: Mapping[str, StoredTensor], sqnr_db: float | None
) -> LinearEntry:
    return LinearEntry(
        scheme=item.scheme,
        shape=spec.shape,
        parts=tuple(zip(spec.sources, spec.parts, strict=True)),
        cut=spec.cut,
        layout=item.layout,
        sqnr_db=sqnr_db,
        tensors={name.rpartition(".")[2]: tensor for name, tensor in stored.items()},
        codes=item.form.codes,
    )
