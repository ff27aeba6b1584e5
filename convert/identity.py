"""What makes two conversions the same: everything that decides a byte of the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qwen3_ascend.checkpoint.manifest import FORMAT_VERSION, canonical_blake3
from qwen3_ascend.convert.encodings import FLOAT
from qwen3_ascend.convert.output.journal import Identity
from qwen3_ascend.convert.output.weight_file import WeightFilePlan
from qwen3_ascend.convert.plan import Plan
from qwen3_ascend.convert.source import Source
from qwen3_ascend.files.hashing import bytes_blake3
from qwen3_ascend.files.safetensors import NAMES

CONVERTER_VERSION = 7
"""Goes up when the same source and recipe give other bytes than before."""

DIGITS = 16


def identity(
    plan: Plan, source: Source, carried: Mapping[str, bytes], hash_source: bool
) -> Identity:
    """The identity of a conversion, by names that a user understands."""
    provider = source.provider
    return {
        "format version": str(FORMAT_VERSION),
        "converter version": str(CONVERTER_VERSION),
        "source": provider.repo,
        "revision": provider.revision or "none",
        "recipe": f"{plan.recipe.name} {_short(dict(plan.recipe.verbatim))}",
        "codes of the source": _codes(plan, source),
        "calibration": _calibration(plan),
        "source hashes": "yes" if hash_source else "no",
        "output files": files_text(plan.weight_files),
        **{f"source file {name}": _weights(source, name) for name in source.weight_files},
        **{f"source file {name}": bytes_blake3(data)[:DIGITS] for name, data in carried.items()},
    }


def _short(value: object) -> str:
    return canonical_blake3(value)[:DIGITS]


def _codes(plan: Plan, source: Source) -> str:
    """Which linears came as codes, and how those are read."""
    kinds = {i.name: i.encoding.kind for i in plan.items if i.encoding != FLOAT}
    return f"{source.quantization.format}, {len(kinds)} {_short(kinds)}" if kinds else "none"


def _calibration(plan: Plan) -> str:
    """The texts, and how much of them is read where."""
    if plan.calibration is None:
        return "none"
    record = plan.calibration.record
    return f"{record}, {record.blake3[:DIGITS] if record.blake3 else 'no file'}"


def files_text(weight_files: Sequence[WeightFilePlan]) -> str:
    """How many weight files there will be, and a hash of what they hold."""
    held = {
        file.file: {name: [NAMES[form.dtype], *form.shape] for name, form in file.tensors.items()}
        for file in weight_files
    }
    return f"{len(weight_files)} {_short(held)}"


def _weights(source: Source, name: str) -> str:
    """Size and header; of a file without a commit also the time of its last change."""
    file, provider = source.weight_files[name], source.provider
    slots = {
        tensor: [NAMES[slot.dtype], *slot.shape, slot.start, slot.stop]
        for tensor, slot in file.slots.items()
    }
    text = f"{file.size} bytes, header {_short(slots)}"
    if provider.revision is not None:
        return text
    return f"{text}, changed at {provider.weight_file(name).stat().st_mtime_ns}"
