"""The same tokens whichever way a step is computed, and how long each way takes."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.runtime import backends
from qwen3_ascend.runtime.backends.base import Backend
from qwen3_ascend.runtime.backends.cache import LayerKV
from qwen3_ascend.runtime.backends.npu import diagnose
from qwen3_ascend.runtime.doctor.agreement import PROMPTS, Answer, agreement, generate
from qwen3_ascend.runtime.doctor.recorder import Recorder
from qwen3_ascend.runtime.doctor.report import Check, Speed, Status
from qwen3_ascend.runtime.doctor.stopwatch import Stopwatch
from qwen3_ascend.runtime.engine.assembly import assemble, make_engine
from qwen3_ascend.runtime.engine.engine import Engine, LogitsEvent
from qwen3_ascend.runtime.model.loader import WeightSource, load_model
from qwen3_ascend.runtime.model.qwen3 import Qwen3
from qwen3_ascend.runtime.options import DeviceOptions, EngineOptions

if TYPE_CHECKING:  # it imports torch_npu, which may not be there
    from qwen3_ascend.runtime.backends.npu.capabilities import Capabilities

AREA = "generation"

LIMITS = EngineOptions(kv_cache_tokens=2048, max_batch=3)
BATCHES = (1, len(PROMPTS))
PADDED = (2, 4)
"""Batch sizes to capture that the prompts do not fill."""

LOGIT_BOUND = 0.25
"""In standard deviations of the logits: the last bits of bf16, carried through the layers."""

EAGER = DeviceOptions("npu", graph=False)
UPDATED, MASKED = (
    DeviceOptions("npu", attention="fused", graph_lengths=lengths)
    for lengths in ("update", "masked")
)
VARIANTS = (
    *(
        dataclasses.replace(UPDATED, attention=attention, graph=graph, prefetch=prefetch)
        for attention in ("fused", "paged")
        for graph in (False, True)
        for prefetch in ("off", "auto")
    ),
    MASKED,
)


@dataclass(frozen=True)
class Subject:
    """A model on the device, loaded once.

    Attributes:
        name: for people.
        source: where its weights are from.
        model: with its weights on the device, and a backend that each variant replaces.
        capabilities: of the machine for it.
    """

    name: str
    source: WeightSource
    model: Qwen3[LayerKV]
    capabilities: Capabilities


def examine(recorder: Recorder, name: str, source: WeightSource) -> list[Speed]:
    """Loads a model, generates with it in every mode, and returns the speeds of those that agree
    with plain steps."""
    subjects: list[Subject] = []

    def load() -> Iterator[Check]:
        started = time.perf_counter()
        backend = diagnose.open_backend(source.config, EAGER)
        model = load_model(source, backend)
        diagnose.wait_for_device()
        subjects.append(Subject(name, source, model, backend.capabilities))
        yield _load_speed(name, source, time.perf_counter() - started)

    recorder.run("load", f"{name}: loading", load)
    if not subjects:
        return []
    runs = _Runs(recorder, subjects[0])
    runs.all_variants()
    recorder.run(AREA, f"{name}: logits of NPU and CPU", lambda: _logits(subjects[0]))
    return runs.speeds


class _Runs:
    """Generations of one model with different settings, held against plain steps."""

    def __init__(self, recorder: Recorder, subject: Subject) -> None:
        self.speeds: list[Speed] = []
        self._recorder, self._subject = recorder, subject
        self._expected: list[Answer] | None = None

    def all_variants(self) -> None:
        """Every attention, with and without graphs and prefetch; graphs of padded batches, and
        those that `NPUGraph.update` updates; and the slowest forms of all operations."""
        subject = self._subject
        for options in VARIANTS:
            label, same_kernels = _settings(options), options.attention == "fused"
            exact = same_kernels and options.graph_lengths != "masked"
            self._run(label, options, subject.capabilities, exact, timed=True)
        for what, options in (("updated", UPDATED), ("masked", MASKED)):
            padded = dataclasses.replace(options, buckets=PADDED)
            label = f"{what} graph replay of a padded batch"
            self._run(label, padded, subject.capabilities, exact=False)
        dispatched = diagnose.without_bound_updates(subject.capabilities)
        self._run("graphs updated by NPUGraph.update", UPDATED, dispatched, exact=True)
        self._recorder.run(AREA, f"{subject.name}: the last form of each", self._last_forms)

    def _run(
        self,
        label: str,
        options: DeviceOptions,
        capabilities: Capabilities,
        exact: bool,
        timed: bool = False,
    ) -> None:
        name, config = f"{self._subject.name}: {label}", self._subject.source.config

        def look() -> Iterator[Check]:
            lacking = diagnose.missing(options, capabilities)
            if lacking:
                yield Check(AREA, name, "skipped", lacking)
                return
            backend = diagnose.open_backend(config, options, capabilities)
            check, stopwatch = self._generate(label, backend, exact)
            yield check
            if timed and check.status == "ok":
                self.speeds += stopwatch.speeds(self._subject.name, label)

        self._recorder.run(AREA, name, look)

    def _last_forms(self) -> Iterator[Check]:
        """What a machine without any newer operator would compute with."""
        oldest = diagnose.of_oldest_forms(self._subject.capabilities)
        backend = diagnose.open_backend(self._subject.source.config, EAGER, oldest)
        yield self._generate("the last form of each operation", backend, exact=False)[0]

    def _generate(
        self, label: str, backend: Backend[LayerKV], exact: bool
    ) -> tuple[Check, Stopwatch]:
        model = dataclasses.replace(self._subject.model, backend=backend)
        stopwatch = Stopwatch(diagnose.wait_for_device)
        gc.collect()  # the caches and graphs of the variant before
        engine = assemble(model, LIMITS, watch=stopwatch.watch)
        for batch in BATCHES:
            answers = generate(engine, batch)
        if self._expected is None:
            self._expected = answers
            name = f"{self._subject.name}: {label}"
            return Check(AREA, name, "ok", "what the others are compared with"), stopwatch
        status, detail = agreement(answers, self._expected, exact)
        return Check(AREA, f"{self._subject.name}: {label}, same tokens", status, detail), stopwatch


def _settings(options: DeviceOptions) -> str:
    lengths = f"--graph --graph-lengths {options.graph_lengths}"
    graph = lengths if options.graph else "--no-graph"
    return f"--attention {options.attention} {graph} --prefetch {options.prefetch}"


def _load_speed(name: str, source: WeightSource, seconds: float) -> Check:
    if not isinstance(source, CheckpointReader):
        return Check("load", f"{name}: loading", "ok", f"{seconds:.2f} s; made, not read")
    nbytes = sum(tensor.nbytes for tensor in source.manifest.stored().values())
    rate = nbytes / seconds / 1e9
    detail = f"{rate:.2f} GB/s ({nbytes:,} bytes in {seconds:.2f} s)"
    return Check("load", f"{name}: loading", "ok", detail)


def _logits(subject: Subject) -> Iterator[Check]:
    """Logits of one prompt on the NPU and on the CPU, in units of their own spread."""
    cpu = backends.get(subject.source.config, DeviceOptions("cpu"))
    engines = (
        make_engine(subject.source, cpu, LIMITS, lambda what, done, total: None),
        assemble(subject.model, LIMITS),
    )
    expected, actual = (_scores(engine, PROMPTS[-1]) for engine in engines)
    worst = float((actual - expected).abs().max() / expected.std())
    status: Status = "ok" if worst <= LOGIT_BOUND else "failed"
    detail = f"{worst:.2g} standard deviations apart, allowed {LOGIT_BOUND}"
    yield Check(AREA, f"{subject.name}: logits of NPU and CPU", status, detail)


def _scores(engine: Engine, tokens: Sequence[int]) -> Tensor:
    """Logits of every token, float32 [T, vocab], from an engine that has nothing else to do."""
    engine.queue(engine.scoring(tokens))
    rows: list[Tensor] = []
    while engine.busy:
        rows += [event.rows for event in engine.step() if isinstance(event, LogitsEvent)]
    return torch.cat(rows)
