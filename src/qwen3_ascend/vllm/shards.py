"""Which part of a stored linear an engine's rank computes with; knows nothing of vLLM but names."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qwen3_ascend.checkpoint.architecture import LM_HEAD
from qwen3_ascend.checkpoint.linear import BIAS, Linear, stored_forms
from qwen3_ascend.checkpoint.manifest import LinearEntry, Manifest
from qwen3_ascend.checkpoint.sharding import shard
from qwen3_ascend.checkpoint.target import Target
from qwen3_ascend.errors import OptionError, UserError


@dataclass(frozen=True)
class Rank:
    """A member of a tensor-parallel group, and how that divides key/value heads.

    Attributes:
        number: 0 <= number < world.
        world: size of the group.
        copies: ranks in a row that hold the same keys and values; 1 unless there are more ranks
            than key/value heads.
    """

    number: int
    world: int
    copies: int = 1


@dataclass(frozen=True)
class Rows:
    """Rows of a vocabulary, and how many an engine keeps for them, the rest being zero."""

    start: int
    count: int
    kept: int


def shard_of(linear: Linear, entry: LinearEntry, rank: Rank) -> Linear:
    """A rank's part of a linear of a layer; its tensors alias the whole's where they can.

    Raises:
        CheckpointError: if a cut would fall inside a block of the layout.
    """
    parts = [outputs for _, outputs in entry.parts]
    divisions = [rank.world] * len(parts)
    if len(parts) == 3:  # queries, keys, values
        divisions[1:] = [rank.world // rank.copies] * 2
    return shard(linear, entry.cut, parts, rank.number, rank.world, divisions)


def rows_of(linear: Linear, rows: Rows) -> Linear:
    """A range of the vocabulary of an output projection, with zeros behind it.

    Raises:
        CheckpointError: if it begins or ends inside a block of the layout.
    """
    return linear.narrow("outputs", [(rows.start, rows.count)]).pad_outputs(rows.kept)


def check_division(manifest: Manifest, world: int, target: Target | None = None) -> None:
    """OptionError unless every linear of a layer can be divided among so many ranks.

    Args:
        manifest: of the checkpoint.
        world: the number of ranks.
        target: whose kernels multiply with the parts; None for a CPU, which takes any.
    """
    model = manifest.model
    heads, kv_heads = model.num_heads, model.num_kv_heads
    copies = max(1, world // kv_heads)
    if heads % world or (kv_heads % world and world % kv_heads):
        raise OptionError(
            f"--tensor-parallel-size {world} does not divide the {heads} query heads and "
            f"{kv_heads} key/value heads of this model; choose {_choices(heads, kv_heads)}"
        )
    for name, entry in manifest.linears.items():
        if name == LM_HEAD:
            continue  # divided as a vocabulary, which is padded
        try:
            part = shard_of(_without_bytes(entry), entry, Rank(world - 1, world, copies))
        except UserError as error:
            raise OptionError(f"--tensor-parallel-size {world}: {name}: {error}") from error
        if target and (refusal := target.refusal(part.scheme, part.shape)):
            raise OptionError(f"--tensor-parallel-size {world}: a part of {name}: {refusal}")


def _choices(heads: int, kv_heads: int) -> str:
    sizes = [
        size
        for size in range(1, heads + 1)
        if heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)
    ]
    return ", ".join(map(str, sizes[:-1])) + f" or {sizes[-1]}" if len(sizes) > 1 else "1"


def _without_bytes(entry: LinearEntry) -> Linear:
    """A linear of a manifest entry's form on torch's meta device."""
    forms = stored_forms(entry.scheme, entry.shape, entry.layout, BIAS in entry.tensors)
    tensors = {
        suffix: torch.empty(form.shape, dtype=form.dtype, device="meta")
        for suffix, form in forms.items()
    }
    return Linear(entry.scheme, entry.shape, entry.layout, tensors)
