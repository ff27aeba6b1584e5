"""What the shipped recipes say of themselves."""

from __future__ import annotations

import re

from qwen3_ascend import recipes

WORDS = ("Purpose", "Bits", "Measured", "Needs")


def recipe_notes(name: str) -> dict[str, str]:
    """The comments at the beginning of a shipped recipe, by the word that each begins with."""
    lines = recipes.text(name).splitlines()
    found = [re.fullmatch(r"# (\w+): (.+)", line) for line in lines]
    count = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return {match[1]: match[2] for match in found[:count] if match is not None}
