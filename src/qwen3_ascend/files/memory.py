"""How much memory this process may still take, and giving back what it does not need."""

from __future__ import annotations

import ctypes
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> int | None:
    """Bytes that can be taken before the machine or the container runs out; None if unknown."""
    known = [nbytes for nbytes in (_of_machine(), _of_container()) if nbytes is not None]
    return min(known) if known else None


def release_free_memory() -> None:
    """Gives the system what the C library keeps of freed memory, if it is one that can (glibc).

    Large tensors that come and go would leave it with as much again as is in use.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def _of_machine() -> int | None:
    try:
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _of_container() -> int | None:
    """What a control group (version 2) leaves; its page cache can be taken back and counts as
    free."""
    try:
        limit = int((CGROUP / "memory.max").read_text())  # "max" where there is no limit
        used = int((CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return max(0, limit - used + int(stat["file"]))
    except (OSError, ValueError, KeyError):
        return None
