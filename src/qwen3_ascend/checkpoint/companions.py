"""The small files that stand beside the weights: which ones travel, and which ones `load` reads."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from qwen3_ascend.errors import CheckpointError

CONFIG_NAME = "config.json"

TEMPLATE_FOLDER = "additional_chat_templates"
"""The only folder of a model whose files count; transformers keeps named chat templates in it."""

LOADED = (
    CONFIG_NAME,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
"""Files that `load` reads, through transformers, when they are there."""

CARRIED = (*LOADED, "LICENSE")
"""Files that travel unchanged from the source to the output when the source has them; the named
templates do as well."""

_TEMPLATE = re.compile(rf"{TEMPLATE_FOLDER}/[^/\\]+\.jinja")


def is_template(name: str) -> bool:
    """Whether a name is that of a named chat template in its folder."""
    return bool(_TEMPLATE.fullmatch(name)) and name.isprintable()


def carried(names: Iterable[str]) -> list[str]:
    """Those files of a model that travel with it, in a fixed order."""
    there = set(names)
    return [name for name in CARRIED if name in there] + sorted(filter(is_template, there))


def loaded_files(folder: Path) -> list[str]:
    """The files of a checkpoint that `load` would read, in a fixed order."""
    templates = (path.relative_to(folder).as_posix() for path in _templates(folder))
    return [name for name in LOADED if (folder / name).is_file()] + sorted(templates)


def file_names(folder: Path) -> set[str]:
    """Names of the files in a folder's root, and of its named chat templates."""
    found = {path.name for path in folder.iterdir() if path.is_file()}
    return found | {path.relative_to(folder).as_posix() for path in _templates(folder)}


def safe_name(name: str) -> str:
    """A file name that stays within its folder; CheckpointError for any other."""
    plain = bool(name) and name == Path(name).name and name not in (".", "..")
    if not (plain or is_template(name)) or "\0" in name:
        raise CheckpointError(f"{name!r} is not a plain file name")
    return name


def _templates(folder: Path) -> list[Path]:
    return [path for path in (folder / TEMPLATE_FOLDER).glob("*.jinja") if path.is_file()]
