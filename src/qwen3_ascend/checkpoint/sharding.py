"""Tensor-parallel cuts on packed bytes; no scheme and no tensor is named in here.

Layouts keep whole blocks together, so a cut is a narrow of one storage axis of each tensor and
never moves an element inside a block: shard(quantize(w)) equals quantize(cut(w)), tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

from qwen3_ascend.checkpoint.layout import Cut
from qwen3_ascend.checkpoint.linear import BIAS, Linear, Span
from qwen3_ascend.errors import CheckpointError


def shard(
    linear: Linear,
    cut: Cut,
    parts: Sequence[int],
    rank: int,
    world: int,
    divisions: Sequence[int] | None = None,
) -> Linear:
    """The part of a linear that belongs to one rank.

    Args:
        linear: the whole linear.
        cut: "outputs" divides the outputs of each part, "inputs" the inputs.
        parts: outputs of each fused source (q, k, v or gate, up), which are divided one by one.
        rank: 0 <= rank < world.
        world: number of ranks.
        divisions: into how many each part is divided along the outputs; default `world`. If it is
            half as many, two ranks in a row hold the same one: so it is with keys and values
            where there are more ranks than key/value heads.

    Returns:
        A linear of the same scheme. After a cut of the inputs only rank 0 keeps the bias,
        because the ranks' products are summed.

    Raises:
        CheckpointError: if a cut would fall inside a block of the layout.
    """
    if world == 1:
        return linear
    if cut == "outputs":
        starts = [sum(parts[:index]) for index in range(len(parts))]
        divisions = divisions or [world] * len(parts)
        spans = [
            _span(start, part, rank * ways // world, ways)
            for start, part, ways in zip(starts, parts, divisions, strict=True)
        ]
        return linear.narrow(cut, spans)
    share = linear.narrow(cut, [_span(0, linear.shape[-1], rank, world)])
    if rank == 0:
        return share
    tensors = {suffix: tensor for suffix, tensor in share.tensors.items() if suffix != BIAS}
    return Linear(share.scheme, share.shape, share.layout, tensors)


def shard_experts(linear: Linear, rank: int, world: int) -> Linear:
    """The experts of one rank, of a linear [experts, N, K]: one range of bytes of each tensor.

    Args:
        linear: of all experts.
        rank: 0 <= rank < world.
        world: number of ranks.

    Raises:
        CheckpointError: if the experts do not split over the ranks.
    """
    return linear.of_experts(*_span(0, linear.shape[0], rank, world))


def _span(start: int, length: int, rank: int, world: int) -> Span:
    if length % world:
        raise CheckpointError(f"{length} does not split over {world} ranks; choose fewer")
    share = length // world
    return start + rank * share, share
