"""How many threads the kernels take: torch's number, but no more than a container may run."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")
"""Where Linux mounts control groups; in a container, that of the container."""


def kernel_threads() -> int:
    """Threads of a kernel: as many as torch takes, within the quota of a container.

    torch counts processors and does not see a quota, as of `docker run --cpus 4`. More threads than
    that are all stopped for the rest of a period once they have used it up, and a kernel waits for
    the last of its threads.
    """
    threads, quota = torch.get_num_threads(), processor_quota()
    return threads if quota is None else min(threads, quota)


@functools.cache
def processor_quota(root: Path = CGROUP) -> int | None:
    """Processors' worth of time that this process's control group may use; None without a bound.

    Version 2 states "quota period" in microseconds in one file, or "max" for no quota; version 1
    has a file for each, and -1 for none (Linux, Documentation/admin-guide/cgroup-v2.rst, "cpu.max",
    and scheduler/sched-bwc.rst).
    """
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        quota, period = _version_1(root / "cpu")
    try:
        processors = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # "max", or a file that says something else
        return None
    return max(1, math.ceil(processors)) if processors > 0 else None


def _version_1(folder: Path) -> tuple[str, str]:
    try:
        files = (folder / f"cpu.cfs_{what}_us" for what in ("quota", "period"))
        quota, period = (file.read_text() for file in files)
    except OSError:
        return "max", "1"
    return quota, period
