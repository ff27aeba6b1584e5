"""What the doctor has found: checks and speeds, as JSON and as a text for an issue."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from qwen3_ascend.version import __version__

Status = Literal["ok", "noted", "skipped", "failed"]
"""noted: it works, but otherwise than on the newest software, or it has to be known."""


@dataclass(frozen=True)
class Check:
    """One finding."""

    area: str
    name: str
    status: Status
    detail: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Speed:
    """Decode steps of a model with some settings.

    Attributes:
        model: which one.
        settings: as options of the command line.
        batch: requests in a step.
        step_ms: a step until the device is done, the median of all.
        host_us: the part of it until the host has issued everything.
    """

    model: str
    settings: str
    batch: int
    step_ms: float
    host_us: float


@dataclass(frozen=True)
class Report:
    """All findings, with what the machine is."""

    environment: dict[str, str]
    checks: tuple[Check, ...]
    speeds: tuple[Speed, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether something was checked and nothing failed."""
        return bool(self.checks) and all(check.status != "failed" for check in self.checks)

    @property
    def counts(self) -> Counter[Status]:
        """How many checks have which status."""
        return Counter(check.status for check in self.checks)

    def fastest(self) -> Iterator[str]:
        """A line for each model and batch size: which settings were fastest, and by how much."""
        for model, batch in dict.fromkeys((speed.model, speed.batch) for speed in self.speeds):
            group = [each for each in self.speeds if (each.model, each.batch) == (model, batch)]
            best, worst = (pick(group, key=lambda each: each.step_ms) for pick in (min, max))
            yield (
                f"fastest for {model}, batch {batch}: {best.settings} ({best.step_ms:g} ms a step, "
                f"{best.host_us:g} us of the host; slowest: {worst.settings}, {worst.step_ms:g} ms)"
            )

    def to_json(self) -> dict[str, Any]:
        """For --json."""
        return {
            "qwen3_ascend": __version__,
            "ok": self.ok,
            "environment": self.environment,
            "checks": [dataclasses.asdict(check) for check in self.checks],
            "speeds": [dataclasses.asdict(speed) for speed in self.speeds],
            "fastest": list(self.fastest()),
        }

    def to_markdown(self) -> str:
        """For an issue: the machine, the speeds, and every check that is not simply ok."""
        counts = ", ".join(f"{count} {status}" for status, count in sorted(self.counts.items()))
        lines = [f"qwen3-ascend {__version__} doctor: {len(self.checks)} checks, {counts}", ""]
        lines += _table(("machine", ""), self.environment.items())
        rows = [
            (check.status, check.area, check.name, check.detail)
            for check in self.checks
            if check.status != "ok" or check.area in ("capabilities", "load")
        ]
        lines += _table(("status", "area", "check", "detail"), rows)
        speeds = [
            (each.model, each.settings, str(each.batch), f"{each.step_ms:g}", f"{each.host_us:g}")
            for each in self.speeds
        ]
        lines += _table(("model", "settings", "batch", "ms a step", "host us"), speeds)
        return "\n".join([*lines, *self.fastest()])


def _table(head: tuple[str, ...], rows: Any) -> list[str]:
    """The lines of a table in Markdown and an empty one; none if it has no rows."""
    cells = [[text.replace("|", "/") for text in row] for row in rows]
    if not cells:
        return []
    return [
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(row)} |" for row in cells),
        "",
    ]
