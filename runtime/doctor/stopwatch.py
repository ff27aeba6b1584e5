"""How long decode steps take: until the host has issued them, and until the device is done."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from qwen3_ascend.runtime.backends.base import Forward
from qwen3_ascend.runtime.backends.step import StepInputs
from qwen3_ascend.runtime.doctor.report import Speed


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step: of the host, and in all."""

    host: float
    whole: float


class Stopwatch:
    """Watches a forward."""

    def __init__(self, wait: Callable[[], None]) -> None:
        """`wait` returns when the device is done."""
        self._wait = wait
        self._times: defaultdict[int, list[StepTime]] = defaultdict(list)

    def watch(self, forward: Forward) -> Forward:
        """The same forward, its decode steps timed."""

        def watched(step: StepInputs) -> Tensor:
            started = time.perf_counter()
            logits = forward(step)
            issued = time.perf_counter()
            self._wait()
            if step.is_decode:
                done = time.perf_counter()
                times = StepTime(issued - started, done - started)
                self._times[len(step.context_lens)].append(times)
            return logits

        return watched

    def speeds(self, model: str, settings: str) -> list[Speed]:
        """The median step of each batch size."""
        return [
            Speed(
                model,
                settings,
                batch,
                step_ms=_digits(1e3 * statistics.median(each.whole for each in times)),
                host_us=_digits(1e6 * statistics.median(each.host for each in times)),
            )
            for batch, times in sorted(self._times.items())
        ]


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
