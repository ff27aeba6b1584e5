"""qwen3_ascend.json: what was done to every tensor, and a hash of every byte.

The manifest is written last; a folder without one is not a checkpoint. Readers obey it and never
guess from names. It also carries a hash of itself, so that an edited manifest is noticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwen3_ascend.checkpoint.errors import CheckpointError, ConfigError
from qwen3_ascend.checkpoint.layout import Cut, Layout
from qwen3_ascend.checkpoint.model import Qwen3Config, read_json_object
from qwen3_ascend.checkpoint.safetensors_file import DTYPES, NAMES, tensor_nbytes

MANIFEST_NAME = "qwen3_ascend.json"
FORMAT = "qwen3-ascend"
FORMAT_VERSION = 1

TARGET = "ascend-a2-a3"
"""The chip family whose kernels read these layouts: 910B (A2) and 910_93 (A3)."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a shard: type, storage shape, file name, and the SHA-256 of its bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    sha256: str

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return tensor_nbytes(self.dtype, self.shape)


@dataclass(frozen=True)
class LinearEntry:
    """One stored linear.

    Attributes:
        scheme: name in the registry of schemes.
        shape: logical (N, K).
        parts: (source linear, outputs) in the order in which they are fused.
        cut: how tensor parallelism may divide it.
        layout: of the weight.
        sqnr_db: signal to quantization noise of the stored bytes against the source weight, in
            decibels: 10 log10(sum w^2 / sum (w - w')^2). None if the two are equal.
        tensors: stored tensors by suffix.
    """

    scheme: str
    shape: tuple[int, int]
    parts: tuple[tuple[str, int], ...]
    cut: Cut
    layout: Layout
    sqnr_db: float | None
    tensors: Mapping[str, StoredTensor]


@dataclass(frozen=True)
class FileEntry:
    """A file and its bytes' hash; for a shard the hash covers the header only, because each of
    its tensors has its own."""

    size: int
    sha256: str


@dataclass(frozen=True)
class SourceRecord:
    """Where the weights came from.

    Attributes:
        repo: a Hub id, or the name of a local folder.
        revision: the commit, for a Hub source.
        files: weight files read.
        ignored: tensors of the source that are not part of the model, each with the reason.
    """

    repo: str
    revision: str | None
    files: Mapping[str, FileEntry]
    ignored: Mapping[str, str]


@dataclass(frozen=True)
class Manifest:
    """Everything a reader needs to know; see the module docstring.

    Attributes:
        tool_version: of the converter.
        model: the configuration.
        recipe: verbatim, as parsed from YAML.
        source: where the weights came from.
        linears: by name, such as "model.layers.0.self_attn.qkv_proj".
        tensors: unquantized tensors (norms, embedding) by name.
        shards: our weight files.
        files: every other file of the folder that we wrote.
    """

    tool_version: str
    model: Qwen3Config
    recipe: Mapping[str, Any]
    source: SourceRecord
    linears: Mapping[str, LinearEntry]
    tensors: Mapping[str, StoredTensor]
    shards: Mapping[str, FileEntry]
    files: Mapping[str, FileEntry]

    def stored(self) -> dict[str, StoredTensor]:
        """Every stored tensor by its name in the shards."""
        return dict(self.tensors) | {
            f"{name}.{suffix}": tensor
            for name, entry in self.linears.items()
            for suffix, tensor in entry.tensors.items()
        }

    def to_json(self) -> dict[str, Any]:
        """The object that is written, with its own hash."""
        body = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "tool_version": self.tool_version,
            "target": TARGET,
            "model": self.model.to_json(),
            "recipe": dict(self.recipe),
            "recipe_sha256": canonical_sha256(dict(self.recipe)),
            "source": _source_to_json(self.source),
            "linears": {name: _linear_to_json(entry) for name, entry in self.linears.items()},
            "tensors": {name: _tensor_to_json(entry) for name, entry in self.tensors.items()},
            "shards": {name: _file_to_json(entry) for name, entry in self.shards.items()},
            "files": {name: _file_to_json(entry) for name, entry in self.files.items()},
        }
        return {**body, "manifest_sha256": canonical_sha256(body)}

    def text(self) -> str:
        """The file's text."""
        return json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads a folder's manifest.

        Raises:
            CheckpointError: if the folder has none, it is of another version, or it was changed
                after it was written.
        """
        path = folder / MANIFEST_NAME
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder")
        if not path.exists():
            raise CheckpointError(
                f"{folder} holds no {MANIFEST_NAME}: not a finished checkpoint of ours; "
                f"make one with: qwen3-ascend convert MODEL OUT"
            )
        try:
            return cls.from_json(read_json_object(path))
        except (ConfigError, CheckpointError) as error:
            raise CheckpointError(f"{path}: {error}") from error

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Manifest:
        """Reads the written form; CheckpointError saying what is wrong with it."""
        _check_identity(data)
        try:
            return cls(
                tool_version=data["tool_version"],
                model=Qwen3Config.from_json(data["model"]),
                recipe=data["recipe"],
                source=_source_from_json(data["source"]),
                linears={n: _linear_from_json(e) for n, e in data["linears"].items()},
                tensors={n: _tensor_from_json(e) for n, e in data["tensors"].items()},
                shards={n: FileEntry(**e) for n, e in data["shards"].items()},
                files={n: FileEntry(**e) for n, e in data["files"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the manifest is not readable: {error!r}") from error


def canonical_sha256(data: Any) -> str:
    """SHA-256 of a JSON value in one fixed spelling (sorted keys, no spaces)."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_identity(data: dict[str, Any]) -> None:
    if data.get("format") != FORMAT:
        raise CheckpointError(f"format is {data.get('format')!r}, not {FORMAT!r}")
    version = data.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"format version {version!r}, but this version reads {FORMAT_VERSION}; "
            f"convert again or install a matching qwen3-ascend"
        )
    body = {key: value for key, value in data.items() if key != "manifest_sha256"}
    if data.get("manifest_sha256") != canonical_sha256(body):
        raise CheckpointError("the manifest was changed after it was written; convert again")


def _tensor_to_json(entry: StoredTensor) -> dict[str, Any]:
    return {
        "dtype": NAMES[entry.dtype],
        "shape": list(entry.shape),
        "file": entry.file,
        "sha256": entry.sha256,
    }


def _tensor_from_json(data: dict[str, Any]) -> StoredTensor:
    return StoredTensor(DTYPES[data["dtype"]], tuple(data["shape"]), data["file"], data["sha256"])


def _file_to_json(entry: FileEntry) -> dict[str, Any]:
    return {"size": entry.size, "sha256": entry.sha256}


def _linear_to_json(entry: LinearEntry) -> dict[str, Any]:
    return {
        "scheme": entry.scheme,
        "shape": list(entry.shape),
        "parts": [list(part) for part in entry.parts],
        "cut": entry.cut,
        "layout": entry.layout.to_json(),
        "sqnr_db": entry.sqnr_db,
        "tensors": {suffix: _tensor_to_json(tensor) for suffix, tensor in entry.tensors.items()},
    }


def _linear_from_json(data: dict[str, Any]) -> LinearEntry:
    outputs, inputs = data["shape"]
    if data["cut"] not in ("column", "row"):
        raise ValueError(f"unknown cut {data['cut']!r}")
    return LinearEntry(
        scheme=data["scheme"],
        shape=(outputs, inputs),
        parts=tuple((source, rows) for source, rows in data["parts"]),
        cut=data["cut"],
        layout=Layout.from_json(data["layout"]),
        sqnr_db=data["sqnr_db"],
        tensors={suffix: _tensor_from_json(tensor) for suffix, tensor in data["tensors"].items()},
    )


def _source_to_json(record: SourceRecord) -> dict[str, Any]:
    return {
        "repo": record.repo,
        "revision": record.revision,
        "files": {name: _file_to_json(entry) for name, entry in record.files.items()},
        "ignored": dict(record.ignored),
    }


def _source_from_json(data: dict[str, Any]) -> SourceRecord:
    files = {name: FileEntry(**entry) for name, entry in data["files"].items()}
    return SourceRecord(data["repo"], data["revision"], files, data["ignored"])
