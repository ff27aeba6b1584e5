"""What makes two conversions the same: everything that decides a byte of the output."""

from __future__ import annotations

from collections.abc import Mapping

from qwen3_ascend.checkpoint.hashing import bytes_sha256
from qwen3_ascend.checkpoint.journal import Identity
from qwen3_ascend.checkpoint.manifest import FORMAT_VERSION, canonical_sha256
from qwen3_ascend.checkpoint.safetensors_file import NAMES
from qwen3_ascend.convert.plan import Plan
from qwen3_ascend.convert.source import Source

CONVERTER_VERSION = 2
"""Goes up when the same source and recipe give other bytes than before."""

DIGITS = 16


def identity(plan: Plan, source: Source, carried: Mapping[str, bytes]) -> Identity:
    """The identity of a conversion, by names that a user understands."""
    provider = source.provider
    return {
        "format version": str(FORMAT_VERSION),
        "converter version": str(CONVERTER_VERSION),
        "source": provider.repo,
        "revision": provider.revision or "none",
        "recipe": f"{plan.recipe.name} {_short(dict(plan.recipe.verbatim))}",
        "source hashes": "yes" if plan.hash_source else "no",
        "output files": f"{len(plan.shards)} {_short(_shards(plan))}",
        **{f"source file {name}": _weights(source, name) for name in source.shards},
        **{f"source file {name}": bytes_sha256(data)[:DIGITS] for name, data in carried.items()},
    }


def _short(value: object) -> str:
    return canonical_sha256(value)[:DIGITS]


def _shards(plan: Plan) -> object:
    return {
        shard.file: {name: [NAMES[dtype], *shape] for name, (dtype, shape) in shard.tensors.items()}
        for shard in plan.shards
    }


def _weights(source: Source, name: str) -> str:
    """Size and header; of a file without a commit also the time of its last change."""
    shard, provider = source.shards[name], source.provider
    slots = {
        tensor: [NAMES[slot.dtype], *slot.shape, slot.start, slot.stop]
        for tensor, slot in shard.slots.items()
    }
    text = f"{shard.size} bytes, header {_short(slots)}"
    if provider.revision is not None:
        return text
    return f"{text}, changed at {provider.shard_file(name).stat().st_mtime_ns}"
