"""qwen3_ascend.json: what was done to every tensor, and a hash of every byte.

The manifest is written last; a folder without one is not a checkpoint. Readers obey it and never
guess from names. It also carries a hash of itself, so that an edited manifest is noticed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from msgspec import Meta

from qwen3_ascend.checkpoint.architecture import of_each_expert
from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.checkpoint.layout import Cut, Layout
from qwen3_ascend.checkpoint.schemes import Scheme, make_scheme
from qwen3_ascend.checkpoint.target import target_named
from qwen3_ascend.errors import CheckpointError, ConfigError, os_errors
from qwen3_ascend.files.hashing import bytes_blake3
from qwen3_ascend.files.json_file import (
    Count,
    Digest,
    Finite,
    Name,
    Size,
    check_keys,
    plain,
    read_json_object,
    typed,
)
from qwen3_ascend.files.safetensors import DTYPES, NAMES, tensor_nbytes

MANIFEST_NAME = "qwen3_ascend.json"
FORMAT = "qwen3-ascend"
FORMAT_VERSION = 1

Hub = Annotated[str, Meta(pattern="^(huggingface|modelscope)$")]
"""Where models are published; text, since options are text."""

QuantizedFormat = Annotated[str, Meta(pattern="^(ascendv1|compressed-tensors|fp8|gptq|awq)$")]
"""In which format a source was quantized already; text, like Hub."""

T = TypeVar("T")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a weight file: type, storage shape, file name, and the BLAKE3 of its bytes."""

    dtype: torch.dtype
    shape: tuple[Count, ...]
    file: Name
    blake3: Digest

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
        parts: (source linear, outputs) in the order in which they are fused; of experts as
            LinearSpec.sources has them.
        cut: how tensor parallelism may divide it.
        layout: of the weight.
        sqnr_db: signal to quantization noise of the stored bytes against the source weight, in
            decibels: 10 log10(sum w^2 / sum (w - w')^2). None if the two are equal.
        tensors: stored tensors by suffix.
        codes: whether the converter has chosen them, as the nearest to floats, or taken them from
            a source that was quantized already. What is taken equals its source, but for scales
            that had to be rounded to bfloat16.
        experts_sqnr_db: sqnr_db of each expert, if there are experts.
        unreached: numbers of the experts that no token of the calibration was given to.
    """

    scheme: Scheme
    shape: Annotated[tuple[Count, ...], Meta(min_length=2)]
    parts: tuple[tuple[Name, Count], ...]
    cut: Cut
    layout: Layout
    sqnr_db: Finite | None
    tensors: Mapping[str, StoredTensor]
    codes: Literal["chosen", "taken"] = "chosen"
    experts_sqnr_db: tuple[Finite | None, ...] = ()
    unreached: tuple[Count, ...] = ()

    @property
    def matrices(self) -> tuple[tuple[str, ...], ...]:
        """The source linears of each stored matrix."""
        experts = self.shape[0] if len(self.shape) > 2 else 0
        return of_each_expert([source for source, _ in self.parts], experts)


@dataclass(frozen=True)
class FileEntry:
    """A file and its bytes' hash; for a weight file the hash covers the header only, because each
    of its tensors has its own."""

    size: Count
    blake3: Digest


@dataclass(frozen=True)
class SourceFile:
    """A weight file of the source; the hash of the whole file is the one that its hub states and
    that was checked, and None for a folder, where nobody states any."""

    size: Count
    sha256: Digest | None


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
        format: in which it was quantized already; None if its weights were floats.
    """

    repo: Name
    hub: Hub | None
    revision: Name | None
    files: Mapping[str, SourceFile]
    tensors: Mapping[str, Digest]
    ignored: Mapping[str, str]
    format: QuantizedFormat | None = None


@dataclass(frozen=True)
class CalibrationRecord:
    """With what a conversion was calibrated.

    Attributes:
        name: of the texts.
        blake3: of their file; None for random token ids.
        tokens: that were read.
        windows: in which they were read, all of one length.
        device: where they were read, cpu or npu.
    """

    name: Name
    blake3: Digest | None
    tokens: Size
    windows: Size
    device: Name

    def __str__(self) -> str:
        """For people."""
        length = self.tokens // self.windows
        return f"{self.name}, {self.windows} windows of {length} tokens, on the {self.device}"


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
        calibration: with what it was calibrated; None if its recipe needs no data.
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
    calibration: CalibrationRecord | None = None

    @property
    def transforms(self) -> tuple[str, ...]:
        """What has made equivalent weights of the source's, in this order; see docs/transforms.md.
        Whoever computes with the checkpoint need not know: it is a Qwen3 like any other."""
        return tuple(self.recipe.get("transforms", ()))

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
            "model": _model_to_json(self.model),
            "recipe": dict(self.recipe),
            "recipe_blake3": canonical_blake3(dict(self.recipe)),
            "source": plain(self.source),
            "linears": {name: _linear_to_json(entry) for name, entry in self.linears.items()},
            "tensors": plain(self.tensors, encode),
            "weight_files": plain(self.weight_files),
            "files": plain(self.files),
        }
        if self.calibration is not None:
            body["calibration"] = plain(self.calibration)
        return {**body, "manifest_blake3": canonical_blake3(body)}

    @property
    def blake3(self) -> str:
        """The hash that it carries of itself."""
        return str(self.to_json()["manifest_blake3"])

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

        def section(name: str, kind: type[T]) -> dict[str, T]:
            entries = typed(data[name], dict[str, object], name)
            return {key: typed(e, kind, f"{name}.{key}", decode) for key, e in entries.items()}

        try:
            found = cls(
                tool_version=typed(data["tool_version"], str, "tool_version"),
                target=target_named(typed(data["target"], str, "target")).name,
                model=typed(data["model"], Qwen3Config, "model"),
                recipe=_recipe(data["recipe"]),
                source=typed(data["source"], SourceRecord, "source"),
                linears=section("linears", LinearEntry),
                tensors=section("tensors", StoredTensor),
                weight_files=section("weight_files", FileEntry),
                files=section("files", FileEntry),
                calibration=_calibration(data),
            )
            check_keys(data, found.to_json(), "it")
            if data["recipe_blake3"] != canonical_blake3(data["recipe"]):
                raise ValueError("recipe_blake3 is not the hash of the recipe")
        except KeyError as error:
            raise CheckpointError(f"the manifest is not readable: {error} is missing") from error
        except ValueError as error:
            raise CheckpointError(f"the manifest is not readable: {error}") from error
        return found


def _recipe(data: object) -> dict[str, Any]:
    recipe = typed(data, dict[str, object], "recipe")
    typed(recipe.get("name"), Name, "recipe.name")
    typed(recipe.get("transforms", []), tuple[str, ...], "recipe.transforms")
    return recipe


def _calibration(data: Mapping[str, Any]) -> CalibrationRecord | None:
    if "calibration" not in data:
        return None
    return typed(data["calibration"], CalibrationRecord, "calibration")


def canonical_blake3(data: Any) -> str:
    """BLAKE3 of a JSON value in one fixed spelling (sorted keys, no spaces)."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return bytes_blake3(text.encode())


def _check_identity(data: dict[str, Any]) -> None:
    if data.get("format") != FORMAT:
        raise CheckpointError(f"format is {data.get('format')!r}, not {FORMAT!r}")
    version = data.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
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


def encode(value: Any) -> object:
    """What JSON says of a type that msgspec does not know."""
    if isinstance(value, torch.dtype):
        return NAMES[value]
    raise TypeError(f"{value!r} has no place in a manifest")


def decode(kind: type, value: Any) -> object:
    """The inverse; ValueError if there is no such type or scheme, which `typed` gives a place."""
    if kind is torch.dtype and isinstance(value, str) and value in DTYPES:
        return DTYPES[value]
    if kind is Scheme and isinstance(value, dict) and isinstance(value.get("name"), str):
        parameters = {key: parameter for key, parameter in value.items() if key != "name"}
        try:
            return make_scheme(value["name"], parameters)
        except CheckpointError as error:
            raise ValueError(str(error)) from error
    raise ValueError(f"{value!r} is no {kind.__name__} that this version knows")


def _model_to_json(model: Qwen3Config) -> dict[str, Any]:
    """A dense model says nothing of experts."""
    said: dict[str, Any] = plain(model)
    return said if model.experts else {key: said[key] for key in said if key != "experts"}


def _linear_to_json(entry: LinearEntry) -> dict[str, Any]:
    """A scheme is a dataclass of its parameters; its name has to be added."""
    of_experts = ("experts_sqnr_db", "unreached")
    left_out = {"scheme", *(key for key in of_experts if not getattr(entry, key))}
    return {"scheme": entry.scheme.to_json()} | {
        key: value for key, value in plain(entry, encode).items() if key not in left_out
    }
