"""What a process has in memory, as Linux counts it. Imports nothing but Python's own."""

from __future__ import annotations

from pathlib import Path

PRIVATE = "RssAnon"
"""Memory that no file backs. Mapped weights are not in it, since the system may take their pages
back and read them again; what is unpacked from them is, and so is a cache, as far as anybody has
written to it."""

MAPPED = "RssFile"
"""Pages of mapped files that the process has touched; others may share them."""


def status(pid: int) -> dict[str, int]:
    """The memory lines of /proc/PID/status, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    pairs = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): int(value) * 1024 for name, value, _ in pairs}
