"""The JSON schema of a manifest, made from the types that read it.

python tests/support/manifest_schema.py > docs/manifest.schema.json
"""

from __future__ import annotations

import inspect
import json
import sys
from typing import Any

import msgspec
import torch

from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.checkpoint.manifest import (
    FORMAT,
    FORMAT_VERSION,
    CalibrationRecord,
    FileEntry,
    LinearEntry,
    SourceRecord,
    StoredTensor,
)
from qwen3_ascend.checkpoint.schemes import SCHEMES, Scheme
from qwen3_ascend.checkpoint.target import TARGETS
from qwen3_ascend.files.json_file import Digest
from qwen3_ascend.files.safetensors import DTYPES

OF_MIXTURES = ("experts", "experts_sqnr_db", "unreached")
"""What a manifest says of mixtures of experts alone."""


def foreign(kind: type) -> dict[str, Any]:
    """The schema of a type that msgspec does not know."""
    if kind is torch.dtype:
        return {"enum": list(DTYPES)}
    assert kind is Scheme
    name = {"type": "string", "enum": list(SCHEMES)}
    return {"type": "object", "properties": {"name": name}, "required": ["name"]}


def manifest_schema() -> dict[str, Any]:
    """The schema of version 1."""
    kinds = [
        Qwen3Config, SourceRecord, LinearEntry, StoredTensor, FileEntry, CalibrationRecord, Digest
    ]  # fmt: skip
    (model, source, linear, tensor, file, calibration, digest), parts = (
        msgspec.json.schema_components(kinds, schema_hook=foreign, ref_template="#/$defs/{name}")
    )
    for part in parts.values():
        if "description" in part:  # a docstring, which Python 3.13 stores without its indent
            part["description"] = inspect.cleandoc(part["description"])
        if "properties" in part:
            part["additionalProperties"] = False
            part["required"] = [name for name in part["properties"] if name not in OF_MIXTURES]

    def named(kind: dict[str, Any]) -> dict[str, Any]:
        return {"type": "object", "additionalProperties": kind}

    properties = {
        "format": {"const": FORMAT},
        "format_version": {"const": FORMAT_VERSION},
        "tool_version": {"type": "string"},
        "target": {"enum": list(TARGETS)},
        "model": model,
        "recipe": {"type": "object", "required": ["name"]},
        "recipe_blake3": digest,
        "source": source,
        "linears": named(linear),
        "tensors": named(tensor),
        "weight_files": named(file),
        "files": named(file),
        "manifest_blake3": digest,
    }
    required, properties = [*properties], properties | {"calibration": calibration}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "qwen3_ascend.json, format version 1",
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
        "$defs": parts,
    }


def schema_text() -> str:
    """The text of docs/manifest.schema.json."""
    return json.dumps(manifest_schema(), indent=2) + "\n"


if __name__ == "__main__":
    sys.stdout.write(schema_text())
