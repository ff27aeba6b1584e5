"""The recipes that ship with the package, as YAML files beside this one."""

from __future__ import annotations

from importlib.resources import files

DEFAULT = "w8a8"
"""The recipe of who asks for none."""

OF_BACKBONES = "w8a8-plain"
"""The same for a model without a head: it is used for its hidden states, which a rotation turns."""


def names() -> list[str]:
    """Names of the shipped recipes, sorted."""
    folder = files("qwen3_ascend.recipes")
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    )


def text(name: str) -> str:
    """The YAML text of a shipped recipe; FileNotFoundError if there is none of that name."""
    return (files("qwen3_ascend.recipes") / f"{name}.yaml").read_text(encoding="utf-8")
