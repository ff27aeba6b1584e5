"""Keeps findings as they are made, whatever happens while they are."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterable

from qwen3_ascend.errors import DeviceStuckError
from qwen3_ascend.runtime.doctor.report import Check

PACKAGE = "qwen3_ascend"
"""Warnings that come from elsewhere are not about the machine."""

Look = Callable[[], Iterable[Check]]


class Recorder:
    """Runs what looks for findings, and keeps them in order."""

    def __init__(self, on_check: Callable[[Check], None]) -> None:
        """`on_check` receives each finding as it is made."""
        self.checks: list[Check] = []
        self._on_check = on_check
        self._stuck = ""

    def note(self, check: Check) -> None:
        """Keeps a finding."""
        self.checks.append(check)
        self._on_check(check)

    def run(self, area: str, name: str, look: Look) -> None:
        """Notes what `look` finds; any exception of it is the last finding, and a failed one.

        A device that waits for ever would let everything wait that comes after: it is left out.
        """
        if self._stuck:
            return self.note(Check(area, name, "skipped", self._stuck))
        started = time.perf_counter()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                for check in look():
                    now = time.perf_counter()
                    self.note(dataclasses.replace(check, seconds=round(now - started, 3)))
                    started = time.perf_counter()
            except DeviceStuckError as error:
                self._stuck = "the device is stuck"
                self.note(Check(area, name, "failed", reason(error)))
            except Exception as error:  # the doctor is there for whatever may happen
                self.note(Check(area, name, "failed", reason(error)))
        for text in dict.fromkeys(_ours(warned)):
            self.note(Check(area, name, "noted", text))
        return None


def reason(error: BaseException) -> str:
    """An exception in a line that fits into a table."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def _ours(warned: Iterable[warnings.WarningMessage]) -> Iterable[str]:
    return (
        str(warning.message)
        for warning in warned
        if PACKAGE in warning.filename and issubclass(warning.category, UserWarning)
    )
