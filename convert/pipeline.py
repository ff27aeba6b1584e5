"""The conversion itself: every item packed, hashed and written, then the manifest.

Each byte of the source is read once for this, and each byte of the output written once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from typing_extensions import override

from qwen3_ascend.checkpoint.architecture import LinearSpec
from qwen3_ascend.checkpoint.manifest import LinearEntry, Manifest, SourceRecord, StoredTensor
from qwen3_ascend.convert import report
from qwen3_ascend.convert.budget import Budget
from qwen3_ascend.convert.calibration.data import Calibration
from qwen3_ascend.convert.calibration.factors import FACTORS_NAME
from qwen3_ascend.convert.calibration.fitting import Fitting
from qwen3_ascend.convert.events import Events
from qwen3_ascend.convert.order import stages, working_order
from qwen3_ascend.convert.output.journal import Done
from qwen3_ascend.convert.output.production import Production
from qwen3_ascend.convert.output.weight_file import WeightFileWriter
from qwen3_ascend.convert.output.writer import OutputWriter
from qwen3_ascend.convert.plan import Item, Plan
from qwen3_ascend.convert.source import Source
from qwen3_ascend.convert.statistics import Seen
from qwen3_ascend.convert.transforms.parts import model_parts
from qwen3_ascend.convert.transforms.whole import ModelChanges
from qwen3_ascend.convert.work import (
    changed_floats,
    convert,
    floats_of,
    make_task,
    require_finite_inputs,
    stored_blake3,
)
from qwen3_ascend.errors import DamagedSourceError
from qwen3_ascend.files.threads import Crew, crew
from qwen3_ascend.native import Kernels


class Conversion(Production[Item]):
    """A plan being carried out."""

    def __init__(
        self,
        plan: Plan,
        source: Source,
        writer: OutputWriter,
        budget: Budget,
        kernels: Kernels,
        hash_source: bool,
        events: Events,
        windows: Sequence[Sequence[int]] = (),
    ) -> None:
        super().__init__(plan.items, writer, budget.threads, events)
        self.plan, self.source = plan, source
        self._kernels, self._hash_source = kernels, hash_source
        self._windows = windows
        self._crew: Crew | None = None
        self._statistics: dict[str, Seen] = {}
        self._readers = Counter(
            file for item in plan.items for file in self._files_of([item])
        ) + Counter(source.file_order(plan.compared))
        self._changes = ModelChanges(model_parts(plan.config), plan.transforms, kernels)
        floats = partial(floats_of, source)
        self.fitting = Fitting(plan, self._changes, floats, writer.staging)
        if plan.calibration is not None:  # a stage is read once more, before its items
            for stage in stages(plan):
                self._readers.update(self._files_of(stage))

    def run(self) -> None:
        """Takes up what is left of an earlier run and does the rest."""
        self._forget_unfitted()
        self.take_up()
        if self.plan.calibration is None:
            todo = self.remaining(working_order(self.plan, self.source))
            self._expect(todo)
            self.make(todo)
        else:
            self._run_calibrated(self.plan.calibration)
        for name, stored in self.plan.alike.items():
            self._require_equal(name, stored)

    def _run_calibrated(self, calibration: Calibration) -> None:
        # Imported here, because what needs no calibration needs no model that computes.
        from qwen3_ascend.convert.calibration.layers import calibrated_pass

        parts = stages(self.plan)
        self._expect([item for stage in parts if self.remaining(stage) for item in stage])
        floats = changed_floats(self.source, self._changes)
        calibrated = calibrated_pass(self, floats, parts, self._windows, self._events)
        calibrated.run(self.writer.staging)

    def _forget_unfitted(self) -> None:
        """Weights of a layer are made again where it is not known what they were changed by."""
        for number, stage in enumerate(stages(self.plan)[1:-1]):
            if not self.fitting.is_known(number):
                for item in stage:
                    self.writer.left.pop(item.name, None)

    def fit(self, number: int, statistics: Mapping[str, Seen]) -> dict[str, Seen]:
        """See Fitting.fit."""
        require_finite_inputs(statistics, stages(self.plan)[number + 1], self.source)
        return self.fitting.fit(number, statistics)

    def make_stage(self, items: Sequence[Item], statistics: dict[str, Seen]) -> None:
        """Makes those items of a stage of a calibrated plan that are not done yet.

        Args:
            items: all of the stage.
            statistics: of the inputs of linears, by name; each is taken out by its item.
        """
        require_finite_inputs(statistics, items, self.source)
        self._statistics = statistics
        self.make(self.remaining(items))
        self._release_files(self._files_of(items))

    def _expect(self, items: Sequence[Item]) -> None:
        self.source.expect([*(n for item in items for n in item.needs), *self.plan.compared])

    def _files_of(self, items: Sequence[Item]) -> list[str]:
        return self.source.file_order(name for item in items for name in item.needs)

    def _require_equal(self, name: str, stored: str) -> None:
        """Holds a source tensor that is left out against the stored one that takes its place."""
        changed = self.plan.transforms  # what is stored is then not what was read
        blake3 = self.done[stored].blake3[stored]
        expected = stored_blake3(self.source.read(stored)) if changed else blake3
        if stored_blake3(self.source.read(name)) != expected:
            raise DamagedSourceError(
                f"config.json ties {name} to {stored}, but the two differ; download the model, "
                f"and convert that folder: then {name} is kept"
            )

    @override
    def task(self, item: Item, file: WeightFileWriter) -> Callable[[], Done]:
        statistics = partial(self._statistics.pop, item.name, None)
        task = make_task(item, self.source, self._changes, statistics)
        advance = partial(self.advance, item.source_bytes // len(task.pieces))
        assert self._crew is not None, "items are made by `make`"
        return partial(convert, task, file, self._kernels, self._crew, self._hash_source, advance)

    @override
    def make(self, items: Sequence[Item]) -> None:
        """Beside the threads that make items are as many for the experts of their linears."""
        with crew(self._threads) as self._crew:
            super().make(items)

    @override
    def drop_pages(self) -> None:
        self.source.drop_pages()

    @override
    def release(self, item: Item) -> None:
        self._release_files(self._files_of([item]))

    def _release_files(self, files: Sequence[str]) -> None:
        for name in files:
            self._readers[name] -= 1
            if not self._readers[name]:
                self.source.release(name)

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
                name: StoredTensor(form.dtype, form.shape, self.files[name], done.blake3[name])
                for name, form in item.forms.items()
            }
            if isinstance(item.spec, LinearSpec):
                linears[item.name] = _linear_entry(item, item.spec, stored, done)
            else:
                tensors |= stored
        return linears, tensors


def run(
    plan: Plan,
    source: Source,
    carried: Mapping[str, bytes],
    writer: OutputWriter,
    budget: Budget,
    kernels: Kernels,
    tool_version: str,
    hash_source: bool,
    events: Events,
    windows: Sequence[Sequence[int]] = (),
) -> Manifest:
    """Converts everything in the plan and publishes the checkpoint.

    `windows` are the token ids that a calibrated plan is calibrated with.

    Raises:
        CheckpointError: if a weight is not finite, a source file is damaged or a file cannot be
            written; nothing is published then.
    """
    for name, data in carried.items():
        writer.add_file(name, data)
    conversion = Conversion(plan, source, writer, budget, kernels, hash_source, events, windows)
    conversion.run()
    if (factors := conversion.fitting.whole()) is not None:
        writer.add_file(FACTORS_NAME, factors)
    calibration = None if plan.calibration is None else plan.calibration.record
    record = SourceRecord(
        source.provider.repo, source.hub, source.provider.revision, source.file_entries(),
        conversion.source_hashes(), plan.ignored, source.quantization.format,
    )  # fmt: skip
    linears, tensors = conversion.entries()
    weight_files = {file: weights.entry for file, weights in writer.weight_files.items()}
    manifest = Manifest(
        tool_version, plan.target.name, plan.config, plan.recipe.verbatim, record, linears, tensors,
        weight_files, writer.files, calibration,
    )  # fmt: skip
    writer.add_file(report.MODEL_CARD_NAME, report.model_card(manifest))
    manifest = replace(manifest, files=writer.files)
    writer.commit(manifest.text().encode())
    return manifest


def _linear_entry(
    item: Item, spec: LinearSpec, stored: Mapping[str, StoredTensor], done: Done
) -> LinearEntry:
    return LinearEntry(
        scheme=item.scheme,
        shape=spec.shape,
        parts=tuple(zip(spec.sources, spec.parts, strict=True)),
        cut=spec.cut,
        layout=item.layout,
        sqnr_db=done.sqnr_db,
        tensors={name.rpartition(".")[2]: tensor for name, tensor in stored.items()},
        codes=item.encoding.codes,
        experts_sqnr_db=done.experts_sqnr_db,
        unreached=done.unreached,
    )
