"""Tensor-parallel cuts on packed bytes; no scheme is named in here.

FRACTAL_NZ keeps its strips outermost, so a cut is a narrow of one storage axis and never moves an
element inside a block: shard(quantize(w)) equals quantize(cut(w)), tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwen3_ascend.checkpoint.layout import Cut, Layout
from qwen3_ascend.checkpoint.schemes import Linear
from qwen3_ascend.errors import CheckpointError


def shard(linear: Linear, cut: Cut, parts: Sequence[int], rank: int, world: int) -> Linear:
    """The part of a linear that belongs to one rank.

    Args:
        linear: the whole linear.
        cut: "outputs" divides the outputs of each part one by one, "inputs" the inputs.
        parts: outputs of each fused source (q, k, v or gate, up), which are cut one by one.
        rank: 0 <= rank < world.
        world: number of ranks.

    Returns:
        A linear of the same scheme. After a cut of the inputs only rank 0 keeps the bias,
        because the ranks' products are summed.

    Raises:
        CheckpointError: if a cut would fall inside a block of the layout.
    """
    if world == 1:
        return linear
    outputs, inputs = linear.shape
    if cut == "outputs":
        spans = _output_spans(parts, rank, world)
        shape = (sum(length for _, length in spans), inputs)
    else:
        spans = [_span(0, inputs, rank, world)]
        shape = (outputs, spans[0][1])
    tensors = {
        name: _cut_tensor(name, tensor, linear.layout, cut, spans)
        for name, tensor in linear.tensors().items()
        if not (name == "bias" and cut == "inputs" and rank > 0)
    }
    return type(linear).from_tensors(shape, linear.layout, tensors)


def max_world(cut: Cut, parts: Sequence[int], inputs: int, layout: Layout) -> int:
    """The largest number of ranks, a power of two, that `shard` accepts."""
    unit = layout.cut_axis(cut)[1]
    lengths = parts if cut == "outputs" else (inputs,)
    world = 1
    while all(length % (2 * world * unit) == 0 for length in lengths):
        world *= 2
    return world


def _span(start: int, length: int, rank: int, world: int) -> tuple[int, int]:
    if length % world:
        raise CheckpointError(f"{length} does not split over {world} ranks; choose fewer")
    share = length // world
    return start + rank * share, share


def _output_spans(parts: Sequence[int], rank: int, world: int) -> list[tuple[int, int]]:
    starts = [sum(parts[:index]) for index in range(len(parts))]
    return [_span(start, part, rank, world) for start, part in zip(starts, parts, strict=True)]


def _cut_tensor(
    name: str, tensor: Tensor, layout: Layout, cut: Cut, spans: Sequence[tuple[int, int]]
) -> Tensor:
    if name == "weight":
        axis, unit = layout.cut_axis(cut)
    elif cut == "outputs":
        axis, unit = 0, 1
    else:
        return tensor
    for start, length in spans:
        if start % unit or length % unit:
            raise CheckpointError(
                f"a cut at {start}+{length} falls inside a block of {unit}; choose fewer ranks"
            )
    pieces = [tensor.narrow(axis, start // unit, length // unit) for start, length in spans]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=axis)
