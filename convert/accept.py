"""Takes up small files that were edited or added after a conversion."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from qwen3_ascend.checkpoint.architecture import model_spec
from qwen3_ascend.checkpoint.companions import CONFIG_NAME, loaded_files
from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.checkpoint.manifest import MANIFEST_NAME, FileEntry, Manifest
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.convert.source.config_file import read_config
from qwen3_ascend.convert.usable import check_usable
from qwen3_ascend.errors import CheckpointError, os_errors
from qwen3_ascend.files.hashing import file_blake3
from qwen3_ascend.files.json_file import read_json_object


@os_errors(CheckpointError)
def accept_files(folder: Path) -> list[str]:
    """Records the small files of a checkpoint as they are now.

    Weights are not touched. The manifest is replaced in one step, after the files have been loaded
    as `load` will load them.

    Args:
        folder: a finished checkpoint.

    Returns:
        A line for each file that was changed, added or removed, and for each thing to know of it.

    Raises:
        CheckpointError: if config.json is gone or describes weights of other shapes.
        ConfigError, SourceError: if a file cannot be used.
    """
    manifest = CheckpointReader(folder, check_files=False).manifest
    kept = [name for name in manifest.files if (folder / name).is_file()]
    names = list(dict.fromkeys([*kept, *loaded_files(folder)]))
    files = {name: _entry(folder / name) for name in names}
    changes = _changes(manifest, files)
    if not changes:
        return []
    if CONFIG_NAME not in files:
        raise CheckpointError(f"{folder / CONFIG_NAME} is missing; put it back")
    notes: list[str] = []
    check_usable({n: (folder / n).read_bytes() for n in names}, str(folder), notes.append)
    model = manifest.model
    if files[CONFIG_NAME] != manifest.files.get(CONFIG_NAME):
        model = _edited_model(folder, manifest.model, notes)
    _replace_manifest(folder, replace(manifest, model=model, files=files))
    return changes + notes


def _entry(path: Path) -> FileEntry:
    return FileEntry(path.stat().st_size, file_blake3(path))


def _changes(manifest: Manifest, files: dict[str, FileEntry]) -> list[str]:
    lines = []
    for name in dict.fromkeys([*manifest.files, *files]):
        was, now = manifest.files.get(name), files.get(name)
        if was != now:
            what = "removed" if now is None else "added" if was is None else "changed"
            lines.append(f"{name}: {what}")
    return lines


def _edited_model(folder: Path, old: Qwen3Config, notes: list[str]) -> Qwen3Config:
    """The configuration as it was edited. Whether the head is tied was decided by the weights."""
    path = folder / CONFIG_NAME
    said = read_config(read_json_object(path), str(path), notes.append)
    edited = replace(said, tie_word_embeddings=old.tie_word_embeddings)
    if model_spec(edited) != model_spec(old):
        raise CheckpointError(
            f"{path} now describes weights of other names or shapes than are stored; convert again"
        )
    return edited


def _replace_manifest(folder: Path, manifest: Manifest) -> None:
    path, fresh = folder / MANIFEST_NAME, folder / f".{MANIFEST_NAME}.new"
    with fresh.open("wb") as file:
        file.write(manifest.text().encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
