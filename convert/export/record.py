"""qwen3_ascend_export.json: what an export was made of, and a hash of every byte of it.

It is written last: a folder without it is no finished export. Engines do not read it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3_ascend.checkpoint.companions import safe_name
from qwen3_ascend.checkpoint.manifest import (
    FileEntry,
    StoredTensor,
    canonical_blake3,
    decode,
    encode,
    manifest_text,
)
from qwen3_ascend.checkpoint.reader import SealedFolder
from qwen3_ascend.checkpoint.verify import Verdict, judge
from qwen3_ascend.convert.output.writer import OutputKind
from qwen3_ascend.errors import CheckpointError, ConfigError, os_errors
from qwen3_ascend.files.json_file import Digest, Name, check_keys, plain, read_json_object, typed

RECORD_NAME = "qwen3_ascend_export.json"
KIND = "qwen3-ascend export"
RECORD_VERSION = 1
OWN_HASH = "record_blake3"


@dataclass(frozen=True)
class ExportRecord:
    """What an export is; see the module docstring.

    Attributes:
        tool_version: of the exporter.
        format: its name.
        checkpoint: hash that the manifest of the exported checkpoint has of itself.
        repo, revision: where the model came from, as that manifest says.
        recipe: name of the recipe that it was converted with.
        tensors: every tensor by name.
        weight_files: those that hold the tensors; each hash is of the header.
        files: every other file of the folder that we wrote.
    """

    tool_version: Name
    format: Name
    checkpoint: Digest
    repo: Name
    revision: Name | None
    recipe: Name
    tensors: Mapping[str, StoredTensor]
    weight_files: Mapping[str, FileEntry]
    files: Mapping[str, FileEntry]

    def stored(self) -> dict[str, StoredTensor]:
        """Every tensor by name."""
        return dict(self.tensors)

    def to_json(self) -> dict[str, Any]:
        """The object that is written, with its own hash."""
        body = {"kind": KIND, "version": RECORD_VERSION, **plain(self, encode)}
        return {**body, OWN_HASH: canonical_blake3(body)}

    def text(self) -> str:
        """The file's text."""
        return manifest_text(self.to_json())

    @classmethod
    @os_errors(CheckpointError)
    def read(cls, folder: Path) -> ExportRecord:
        """Reads a folder's record.

        Raises:
            CheckpointError: if the folder has none, it is of another version, or it was changed
                after it was written.
        """
        path = folder / RECORD_NAME
        if not path.is_file():
            raise CheckpointError(f"{folder} holds no {RECORD_NAME}: not a finished export of ours")
        try:
            data = read_json_object(path)
            found = cls._from_json(data)
            if path.read_bytes() != manifest_text(data).encode():
                raise ValueError("it was changed after it was written")
        except (ConfigError, ValueError) as error:
            raise CheckpointError(f"{path}: {error}; export again") from error
        return found

    @classmethod
    def _from_json(cls, data: dict[str, Any]) -> ExportRecord:
        said = data.get("kind"), data.get("version")
        if said != (KIND, RECORD_VERSION):
            raise ValueError(f"it is {said[0]!r} of version {said[1]!r}, not {RECORD_VERSION}")
        body = {key: value for key, value in data.items() if key != OWN_HASH}
        if data.get(OWN_HASH) != canonical_blake3(body):
            raise ValueError("it was changed after it was written")
        fields = {key: value for key, value in body.items() if key not in ("kind", "version")}
        found = typed(fields, cls, "it", decode)
        check_keys(data, found.to_json(), "it")
        return found


def export_files(folder: Path) -> list[str]:
    """The files of the export that is in a folder, as its record knows them."""
    try:
        record = ExportRecord.read(folder)
        return [RECORD_NAME, *map(safe_name, (*record.weight_files, *record.files))]
    except CheckpointError:
        return []


EXPORT = OutputKind("export", RECORD_NAME, export_files)


@os_errors(CheckpointError)
def is_export(folder: Path) -> bool:
    """Whether a folder holds a record, which comes last; CheckpointError if it cannot be told."""
    return (folder / RECORD_NAME).is_file()


@os_errors(CheckpointError)
def verify_export(
    folder: Path,
    progress: Callable[[int], None] = lambda nbytes: None,
    threads: int | None = None,
) -> Verdict:
    """Re-hashes every byte of an export.

    Args:
        folder: a finished export.
        progress: called with the bytes of each tensor or file once it is checked.
        threads: that hash at a time; default one for each processor.

    Raises:
        CheckpointError: if the folder cannot be opened at all (no record, a truncated file).
    """
    sealed = SealedFolder(folder, ExportRecord.read(folder))
    problems = [
        f"file {path.name} is not in the record, and engines would load it"
        for path in sorted(folder.glob("*.safetensors"))
        if path.name not in sealed.manifest.weight_files
    ]
    return judge(sealed, problems, progress, threads)
