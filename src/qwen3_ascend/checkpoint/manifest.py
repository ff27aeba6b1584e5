"""qwen3_ascend.json: what was done to every tensor, and a hash of every byte.

The manifest is written last; a folder without one is not a checkpoint. Readers obey it and never
guess from names. It also carries a hash of itself, so that an edited manifest is noticed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from qwen3_ascend.checkpoint.config import ROPE_TYPES, Qwen3Config
from qwen3_ascend.checkpoint.layout import Cut, Layout
from qwen3_ascend.checkpoint.schemes import Scheme, make_scheme
from qwen3_ascend.checkpoint.target import target_named
from qwen3_ascend.errors import CheckpointError, ConfigError, os_errors
from qwen3_ascend.files.hashing import bytes_blake3
from qwen3_ascend.files.json_file import read_json_object
from qwen3_ascend.files.safetensors import DTYPES, NAMES, tensor_nbytes

MANIFEST_NAME = "qwen3_ascend.json"
FORMAT = "qwen3-ascend"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a weight file: type, storage shape, file name, and the BLAKE3 of its bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    blake3: str

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return tensor_nbytes(self.dtype, self.shape)


@dataclass(frozen=True)
class LinearEntry:
    """One stored linear.

    Attributes:
        scheme: with its parameters.
        shape: logical (N, K); further axes, such as experts, come first.
        parts: (source linear, outputs) in the order in which they are fused.
        cut: how tensor parallelism may divide it.
        layout: of the weight.
        sqnr_db: signal to quantization noise of the stored bytes against the source weight, in
            decibels: 10 log10(sum w^2 / sum (w - w')^2). None if the two are equal.
        tensors: stored tensors by suffix.
    """

    scheme: Scheme
    shape: tuple[int, ...]
    parts: tuple[tuple[str, int], ...]
    cut: Cut
    layout: Layout
    sqnr_db: float | None
    tensors: Mapping[str, StoredTensor]


@dataclass(frozen=True)
class FileEntry:
    """A file and its bytes' hash; for a weight file the hash covers the header only, because each
    of its tensors has its own."""

    size: int
    blake3: str


@dataclass(frozen=True)
class SourceFile:
    """A weight file of the source; the hash of the whole file is the one that its hub states and
    that was checked, and None for a folder, where nobody states any."""

    size: int
    sha256: str | None


@dataclass(frozen=True)
class SourceRecord:
    """Where the weights came from.

    Attributes:
        repo: a Hub id, or the name of a local folder.
        hub: where it was found, huggingface or modelscope; None for a local folder.
        revision: the commit, for a Hub source.
        files: weight files.
        tensors: BLAKE3 of the bytes of every tensor that was read, by its name in the source; none
            unless the conversion was asked for them.
        ignored: tensors of the source that are not part of the model, each with the reason.
    """

    repo: str
    hub: str | None
    revision: str | None
    files: Mapping[str, SourceFile]
    tensors: Mapping[str, str]
    ignored: Mapping[str, str]


@dataclass(frozen=True)
class Manifest:
    """Everything a reader needs to know; see the module docstring.

    Attributes:
        tool_version: of the converter.
        target: name of the chip family whose kernels read these layouts.
        model: the configuration.
        recipe: verbatim, as parsed from YAML.
        source: where the weights came from.
        linears: by name, such as "model.layers.0.self_attn.qkv_proj".
        tensors: unquantized tensors (norms, embedding) by name.
        weight_files: those that hold the tensors.
        files: every other file of the folder that we wrote.
    """

    tool_version: str
    target: str
    model: Qwen3Config
    recipe: Mapping[str, Any]
    source: SourceRecord
    linears: Mapping[str, LinearEntry]
    tensors: Mapping[str, StoredTensor]
    weight_files: Mapping[str, FileEntry]
    files: Mapping[str, FileEntry]

    def stored(self) -> dict[str, StoredTensor]:
        """Every stored tensor by its name in the weight files."""
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
            "target": self.target,
            "model": self.model.to_json(),
            "recipe": dict(self.recipe),
            "recipe_blake3": canonical_blake3(dict(self.recipe)),
            "source": _source_to_json(self.source),
            "linears": {name: _linear_to_json(entry) for name, entry in self.linears.items()},
            "tensors": {name: _tensor_to_json(entry) for name, entry in self.tensors.items()},
            "weight_files": {
                name: _file_to_json(entry) for name, entry in self.weight_files.items()
            },
            "files": {name: _file_to_json(entry) for name, entry in self.files.items()},
        }
        return {**body, "manifest_blake3": canonical_blake3(body)}

    def text(self) -> str:
        """The file's text."""
        return manifest_text(self.to_json())

    @classmethod
    @os_errors(CheckpointError)
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
            data = read_json_object(path)
            found = cls.from_json(data)
            if path.read_bytes() != manifest_text(data).encode():  # white space, or 1E3 for 1e3
                raise _changed()
        except (ConfigError, CheckpointError) as error:
            raise CheckpointError(f"{path}: {error}") from error
        return found

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Manifest:
        """Reads the written form; CheckpointError saying what is wrong with it."""
        _check_identity(data)
        try:
            return cls(
                tool_version=_string(data["tool_version"]),
                target=target_named(_string(data["target"])).name,
                model=_model(data["model"]),
                recipe=_recipe(data["recipe"]),
                source=_source_from_json(data["source"]),
                linears={n: _linear_from_json(e) for n, e in data["linears"].items()},
                tensors={n: _tensor_from_json(e) for n, e in data["tensors"].items()},
                weight_files={n: _file_from_json(e) for n, e in data["weight_files"].items()},
                files={n: _file_from_json(e) for n, e in data["files"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CheckpointError(f"the manifest is not readable: {error!r}") from error


def canonical_blake3(data: Any) -> str:
    """BLAKE3 of a JSON value in one fixed spelling (sorted keys, no spaces)."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return bytes_blake3(text.encode())


def _check_identity(data: dict[str, Any]) -> None:
    if data.get("format") != FORMAT:
        raise CheckpointError(f"format is {data.get('format')!r}, not {FORMAT!r}")
    version = data.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"format version {version!r}, but this version reads {FORMAT_VERSION}; "
            f"convert again or install a matching qwen3-ascend"
        )
    body = {key: value for key, value in data.items() if key != "manifest_blake3"}
    if data.get("manifest_blake3") != canonical_blake3(body):
        raise _changed()


def _changed() -> CheckpointError:
    return CheckpointError("the manifest was changed after it was written; convert again")


def manifest_text(data: Mapping[str, Any]) -> str:
    """The one spelling of a manifest: a line for each linear, tensor and file, for people to read
    and quick to make."""
    entries = [f" {_compact(key)}: {_section(value)}" for key, value in data.items()]
    return "{\n" + ",\n".join(entries) + "\n}\n"


def _section(value: Any) -> str:
    if not isinstance(value, dict) or not value:
        return _compact(value)
    entries = [f"  {_compact(key)}: {_compact(entry)}" for key, entry in value.items()]
    return "{\n" + ",\n".join(entries) + "\n }"


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _tensor_to_json(entry: StoredTensor) -> dict[str, Any]:
    return {
        "dtype": NAMES[entry.dtype],
        "shape": list(entry.shape),
        "file": entry.file,
        "blake3": entry.blake3,
    }


def _tensor_from_json(data: dict[str, Any]) -> StoredTensor:
    shape = tuple(map(_count, data["shape"]))
    return StoredTensor(
        DTYPES[data["dtype"]], shape, _string(data["file"]), _string(data["blake3"])
    )


def _file_to_json(entry: FileEntry) -> dict[str, Any]:
    return {"size": entry.size, "blake3": entry.blake3}


def _file_from_json(data: dict[str, Any]) -> FileEntry:
    return FileEntry(_count(data["size"]), _string(data["blake3"]))


def _linear_to_json(entry: LinearEntry) -> dict[str, Any]:
    return {
        "scheme": entry.scheme.to_json(),
        "shape": list(entry.shape),
        "parts": [list(part) for part in entry.parts],
        "cut": entry.cut,
        "layout": entry.layout.to_json(),
        "sqnr_db": entry.sqnr_db,
        "tensors": {suffix: _tensor_to_json(tensor) for suffix, tensor in entry.tensors.items()},
    }


def _linear_from_json(data: dict[str, Any]) -> LinearEntry:
    if len(data["shape"]) < 2:
        raise ValueError(f"{data['shape']!r} is not the shape of a linear")
    if data["cut"] not in ("outputs", "inputs"):
        raise ValueError(f"unknown cut {data['cut']!r}")
    return LinearEntry(
        scheme=_scheme(data["scheme"]),
        shape=tuple(map(_count, data["shape"])),
        parts=tuple((_string(source), _count(rows)) for source, rows in data["parts"]),
        cut=data["cut"],
        layout=Layout.from_json(data["layout"]),
        sqnr_db=None if data["sqnr_db"] is None else _number(data["sqnr_db"]),
        tensors={suffix: _tensor_from_json(tensor) for suffix, tensor in data["tensors"].items()},
    )


def _scheme(data: dict[str, Any]) -> Scheme:
    return make_scheme(
        _string(data["name"]), {key: value for key, value in data.items() if key != "name"}
    )


def _source_to_json(record: SourceRecord) -> dict[str, Any]:
    return {
        "repo": record.repo,
        "hub": record.hub,
        "revision": record.revision,
        "files": {
            name: {"size": entry.size, "sha256": entry.sha256}
            for name, entry in record.files.items()
        },
        "tensors": dict(record.tensors),
        "ignored": dict(record.ignored),
    }


def _source_from_json(data: dict[str, Any]) -> SourceRecord:
    return SourceRecord(
        repo=_string(data["repo"]),
        hub=_optional_string(data["hub"]),
        revision=_optional_string(data["revision"]),
        files={
            name: SourceFile(_count(entry["size"]), _optional_string(entry["sha256"]))
            for name, entry in data["files"].items()
        },
        tensors={name: _string(blake3) for name, blake3 in data["tensors"].items()},
        ignored={name: _string(reason) for name, reason in data["ignored"].items()},
    )


def _model(data: dict[str, Any]) -> Qwen3Config:
    """The configuration, each number of it of its type: the runtime divides by some of them."""
    config = Qwen3Config.from_json(data)
    check = {"int": _count, "float": _number, "bool": _flag}
    for holder in (config, config.rope):
        for field in fields(holder):
            value = getattr(holder, field.name)
            if str(field.type) in check:
                check[str(field.type)](value)
            if str(field.type) == "int" and not value and field.name != "original_max_position":
                raise ValueError(f"{field.name} is 0")
    if config.rope.type not in ROPE_TYPES:
        raise ValueError(f"unknown rope type {config.rope.type!r}")
    return config


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is neither true nor false")
    return value


def _recipe(data: dict[str, Any]) -> dict[str, Any]:
    _string(data["name"])
    return data


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _optional_string(value: Any) -> str | None:
    return None if value is None else _string(value)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise TypeError(f"{value!r} is not a count")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise TypeError(f"{value!r} is not a number")
    return float(value)
