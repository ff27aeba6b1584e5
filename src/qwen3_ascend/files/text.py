"""Sizes and tables as people read and write them."""

from __future__ import annotations

import re
from collections.abc import Sequence

_POWERS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def parse_size(size: int | str) -> int:
    """Bytes of a number, or of a text such as 512MiB or 2G; the units are powers of 1024.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", str(size).strip(), re.IGNORECASE)
    if found is None:
        raise ValueError(f"{size!r} is not a size such as 512MiB or 2G")
    return int(float(found[1]) * 2 ** _POWERS[found[2].upper()])


def size_text(nbytes: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def table(rows: Sequence[tuple[str, ...]], header: tuple[str, ...]) -> list[str]:
    """Aligned columns; the last one to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False)]
        lines.append("  ".join([*cells, row[-1].rjust(widths[-1])]))
    return lines
