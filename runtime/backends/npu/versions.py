"""Which torch_npu belongs to which torch and to which CANN, and what to install.

A wheel's number begins with the version of the torch that it extends. What follows, `.postN`, is
not a later state of the same: it is the line of CANN that the wheel was built against. So pip,
which takes the highest number or exactly the one it is told, cannot choose.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

PUBLISHED = (
    ("9.1", ("2.12.0", "2.11.0", "2.10.0.post4", "2.9.0.post6", "2.7.1.post8")),
    ("9.0", ("2.10.0.post2", "2.10.0", "2.9.0.post2", "2.8.0.post4", "2.7.1.post4")),
    ("8.5", ("2.9.0", "2.8.0.post2", "2.7.1.post2", "2.6.0.post5")),
    ("8.3", ("2.8.0", "2.7.1", "2.6.0.post3")),
    ("8.2", ("2.6.0",)),
)
"""(CANN, the wheels published for it, the one to take for a torch before others), as Ascend/pytorch
states them in COMPATIBILITY.en.md, read at 9e73e708. torch_npu 2.13.0 and 2.14.0 exist, but have
no row there."""

OLDEST_CANN = "8.3"
"""Wheels for CANN 8.2 lack operators of a decode step (docs/ascend.md)."""

CANN_HOMES = ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH")
"""Variables that CANN's set_env.sh sets to the folder of the toolkit."""

VERSION_FILES = ("ascend_*_install.info", "version.cfg")
"""Where the toolkit states its version; the first one first."""

STATED = re.compile(r"^version=(\d[\w.-]*)|\[[\d.]+:(\d+\.\d+[\w.-]*)\]", re.MULTILINE)
"""`version=8.3.RC1` in the one, `runtime_running_version=[7.7.0.1:8.3.RC1]` in the other."""


def base_version(version: str) -> str:
    """The release that a version belongs to: 2.10.0 of 2.10.0.post4, 2.10.0+git1a2b3c4 and
    2.10.0rc1."""
    release = re.match(r"\d+(\.\d+)*", version)
    return release.group() if release else version


def cann_line(version: str) -> str | None:
    """The line of a CANN version, such as 8.3 of 8.3.RC1; None if the text is no version."""
    line = re.match(r"\d+\.\d+", version)
    return line.group() if line else None


def installed_cann() -> str | None:
    """The version of the CANN that set_env.sh has set up, as it states it; None if none is."""
    homes = [os.environ[name] for name in CANN_HOMES if os.environ.get(name)]
    return next(_stated_versions(Path(homes[0])), None) if homes else None


def published_cann(wheel: str) -> str | None:
    """The line of CANN that a torch_npu was published for; None if no table tells."""
    public = wheel.split("+")[0]
    return next((cann for cann, wheels in PUBLISHED if public in wheels), None)


def advice(torch_version: str, cann: str | None) -> str:
    """What to install beside a torch, given the CANN that was found or None."""
    torch_base = base_version(torch_version)
    wheels = {line: _of_torch(torch_base, published) for line, published in PUBLISHED}
    line = cann_line(cann) if cann else None
    if line is None:
        return _choose_by_cann(torch_base, wheels)
    if wheels.get(line):
        return f"for CANN {line}: pip install --no-deps torch_npu=={wheels[line]}"
    others = ", ".join(dict(PUBLISHED).get(line, ())) or "none is in our table"
    return (
        f"no torch_npu for torch {torch_base} is published for CANN {line} ({others}): install "
        f"the torch of one of these and then the wheel with pip install --no-deps, or change CANN"
    )


def _choose_by_cann(torch_base: str, wheels: dict[str, str | None]) -> str:
    choices = [f"{wheel} for CANN {line}" for line, wheel in wheels.items() if wheel]
    if not choices:
        return (
            f"no torch_npu for torch {torch_base} is published for any CANN; the newest that is, "
            f"{PUBLISHED[0][1][0]}, is for CANN {PUBLISHED[0][0]}"
        )
    return f"pip install --no-deps torch_npu=={'; or =='.join(choices)}"


def _of_torch(torch_base: str, wheels: tuple[str, ...]) -> str | None:
    return next((wheel for wheel in wheels if base_version(wheel) == torch_base), None)


def _stated_versions(home: Path) -> Iterator[str]:
    for pattern in VERSION_FILES:
        for folder in (home, *home.glob("*"), *home.glob("*/*")):
            for path in sorted(folder.glob(pattern)):
                stated = STATED.search(path.read_text(encoding="utf-8", errors="replace"))
                if stated:
                    yield stated.group(1) or stated.group(2)
