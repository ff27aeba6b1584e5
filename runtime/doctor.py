"""`qwen3-ascend doctor`: confirms on a real card, in about a minute, what could only be simulated.

Without a card it says what is missing. Every finding is a Check; the report is one JSON object
that can be pasted into an issue.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.checkpoint.schemes import SCHEMES
from qwen3_ascend.errors import UserError
from qwen3_ascend.runtime import backends
from qwen3_ascend.runtime.backends.npu import diagnose
from qwen3_ascend.runtime.conformance import compare_backends
from qwen3_ascend.runtime.engine.assembly import make_engine
from qwen3_ascend.runtime.engine.engine import Engine
from qwen3_ascend.runtime.engine.request import SamplingParams
from qwen3_ascend.runtime.model.loader import WeightSource
from qwen3_ascend.runtime.options import DeviceOptions, EngineOptions
from qwen3_ascend.runtime.synthetic import SMALL_CONFIG, SyntheticWeights
from qwen3_ascend.version import __version__

Status = Literal["ok", "failed", "skipped"]

LIMITS = EngineOptions(kv_cache_tokens=2048, max_batch=3)
PROMPTS = tuple(tuple((37 * i + 11 * n) % 1000 for i in range(n)) for n in (5, 127, 130))
"""Prompts of random tokens; two of them cross a block of 128 while they decode."""

PADDED = (2, 4)
"""Batch sizes to capture that the three prompts do not fill."""

NEW_TOKENS = 24

LOGIT_BOUND = 0.25
"""In standard deviations of the logits: the last bits of bf16, carried through the layers."""


@dataclass(frozen=True)
class Check:
    """One finding."""

    area: str
    name: str
    status: Status
    detail: str
    seconds: float = 0.0


@dataclass(frozen=True)
class Report:
    """All findings, with what the machine is."""

    environment: dict[str, str]
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether something was checked and nothing failed."""
        return bool(self.checks) and all(check.status != "failed" for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """For --json."""
        return {
            "qwen3_ascend": __version__,
            "ok": self.ok,
            "environment": self.environment,
            "checks": [dataclasses.asdict(check) for check in self.checks],
        }


def run(checkpoint: Path | None, on_check: Callable[[Check], None]) -> Report:
    """Runs every check.

    Args:
        checkpoint: a converted model to generate with; None for a small random one.
        on_check: receives each finding as it is made.
    """
    facts, checks = diagnose.environment(), []
    try:
        facts |= diagnose.card()
    except UserError as error:
        check = Check("environment", "an NPU that can be used", "failed", str(error))
        on_check(check)
        return Report(facts, (check,))
    for check in _timed(_all_checks(checkpoint)):
        on_check(check)
        checks.append(check)
    return Report(facts, tuple(checks))


def _timed(checks: Iterator[Check]) -> Iterator[Check]:
    """The checks with their times; a crash is a finding and ends the run."""
    while True:
        started = time.perf_counter()
        try:
            check = next(checks)
        except StopIteration:
            return
        except (UserError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:400]
            yield Check("run", "the checks run to their end", "failed", reason)
            return
        yield dataclasses.replace(check, seconds=round(time.perf_counter() - started, 3))


def _all_checks(checkpoint: Path | None) -> Iterator[Check]:
    for name, holds in diagnose.layout_checks():
        status: Status = "skipped" if holds is None else "ok" if holds else "failed"
        yield Check("layout", name, status, "this chip casts to ND" if holds is None else "")
    definition = backends.reference_backend(SMALL_CONFIG)
    npu = backends.get(SMALL_CONFIG, DeviceOptions("npu", graph=False))
    for compared in compare_backends(definition, npu, SMALL_CONFIG):
        detail = f"{compared.error:.2g}, allowed {compared.bound:.2g}"
        yield Check("operators", compared.name, "ok" if compared.ok else "failed", detail)
    for name, source in _models(checkpoint):
        yield from _generation(name, source)


def _models(checkpoint: Path | None) -> Iterator[tuple[str, WeightSource]]:
    if checkpoint is not None:
        yield checkpoint.name, CheckpointReader(checkpoint)
        return
    for scheme in SCHEMES:
        yield f"random {scheme}", SyntheticWeights(SMALL_CONFIG, scheme)


def _generation(name: str, source: WeightSource) -> Iterator[Check]:
    """The same tokens whichever way a step is run; and how far the CPU agrees."""
    eager = _tokens(_npu_engine(source, DeviceOptions("npu", graph=False, prefetch="off")))
    variants = {
        "prefetch on": DeviceOptions("npu", graph=False, prefetch="auto"),
        "graph replay": DeviceOptions("npu", prefetch="off"),
        "graph replay, prefetch on": DeviceOptions("npu", prefetch="auto"),
        "graph replay of a padded batch": DeviceOptions("npu", prefetch="off", buckets=PADDED),
    }
    for label, options in variants.items():
        tokens = _tokens(_npu_engine(source, options))
        yield _agreement(f"{name}: {label} against eager", tokens, eager, exact=True)
    try:
        paged = _tokens(_npu_engine(source, DeviceOptions("npu", attention="paged")))
        yield _agreement(f"{name}: paged against fused attention", paged, eager, exact=False)
    except UserError as error:
        yield Check("generation", f"{name}: paged attention", "skipped", str(error))
    yield _logits(name, source)


def _logits(name: str, source: WeightSource) -> Check:
    """Logits of one prompt on the NPU and on the CPU, in units of their own spread."""
    cpu = backends.get(source.config, DeviceOptions("cpu"))
    expected, actual = (
        torch.cat([*engine.score(PROMPTS[-1])])
        for engine in (
            make_engine(source, cpu, LIMITS, _no_progress),
            _npu_engine(source, DeviceOptions("npu", graph=False)),
        )
    )
    worst = float((actual - expected).abs().max() / expected.std())
    status: Status = "ok" if worst <= LOGIT_BOUND else "failed"
    detail = f"{worst:.2g} standard deviations apart, allowed {LOGIT_BOUND}"
    return Check("generation", f"{name}: logits of NPU and CPU", status, detail)


def _npu_engine(source: WeightSource, options: DeviceOptions) -> Engine:
    backend = backends.get(source.config, options)
    return make_engine(source, backend, LIMITS, _no_progress)


def _tokens(engine: Engine) -> list[list[int]]:
    params = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    requests = [engine.add(prompt, params, frozenset()) for prompt in PROMPTS]
    while engine.busy:
        engine.step()
    return [list(request.output) for request in requests]


def _agreement(name: str, tokens: list[list[int]], expected: list[list[int]], exact: bool) -> Check:
    """Equal tokens; or, where kernels may round differently, equal first tokens."""
    same = [_common(left, right) for left, right in zip(tokens, expected, strict=True)]
    needed = NEW_TOKENS if exact else 1
    detail = f"{'/'.join(map(str, same))} of {NEW_TOKENS} tokens equal, at least {needed} wanted"
    return Check("generation", name, "ok" if min(same) >= needed else "failed", detail)


def _common(left: list[int], right: list[int]) -> int:
    pairs = enumerate(zip(left, right, strict=True))
    return next((at for at, (a, b) in pairs if a != b), len(left))


def _no_progress(what: str, done: int, total: int) -> None:
    """Nobody watches."""
