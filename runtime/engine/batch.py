"""What one step computes: chunks of requests, and the inputs of the forward pass for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3_ascend.runtime.backends.step import StepInputs
from qwen3_ascend.runtime.engine.request import Request

UNKNOWN = 0
"""Stands on the host for a token that only the device knows."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of a request that one step computes.

    Attributes:
        request: whose.
        start: place of the first of them in the request.
        count: how many.
        logit_rows: of how many of its last rows the logits are wanted: of all, of the last one if
            a token is chosen then, or of none.
        is_carried: whether it is one token that only the device knows when the step is made.
    """

    request: Request
    start: int
    count: int
    logit_rows: int
    is_carried: bool = False

    @classmethod
    def next_of(cls, request: Request, count: int) -> Chunk:
        """The next `count` tokens that the device has not been given yet."""
        rows = count if request.wants_logits else int(count == request.pending)
        is_carried = request.begun >= len(request.tokens)
        return cls(request, request.begun, count, rows, is_carried)

    @property
    def positions(self) -> range:
        """Their places in the request."""
        return range(self.start, self.start + self.count)

    @property
    def chooses(self) -> bool:
        """Whether the step ends in a token of this request."""
        return bool(self.logit_rows) and not self.request.wants_logits


@dataclass(frozen=True)
class Batch:
    """The chunks of one step, each of another request, those that are carried first."""

    chunks: tuple[Chunk, ...]

    @property
    def tokens(self) -> int:
        """Rows of the step."""
        return sum(chunk.count for chunk in self.chunks)

    @property
    def choosing(self) -> list[Request]:
        """The requests that get a token, in the order of their logits."""
        return [chunk.request for chunk in self.chunks if chunk.chooses]


def step_inputs(batch: Batch, block_size: int, carried: Tensor | None = None) -> StepInputs:
    """The inputs of a batch, on the host; all blocks that it writes to are in the block tables.

    The logits are those that the chunks want, in their order; where none are wanted, those of the
    last row, since no kernel takes an empty tensor.

    Args:
        batch: the chunks.
        block_size: of the cache.
        carried: the tokens of the carried chunks, on the device.
    """
    starts = [0]
    for chunk in batch.chunks:
        starts.append(starts[-1] + chunk.count)
    places = [(chunk.request, p) for chunk in batch.chunks for p in chunk.positions]
    tokens = [
        token
        for chunk in batch.chunks
        for token in (
            [UNKNOWN]
            if chunk.is_carried
            else chunk.request.tokens[chunk.start : chunk.positions.stop]
        )
    ]
    slots = [
        request.block_table[position // block_size] * block_size + position % block_size
        for request, position in places
    ]
    return StepInputs(
        tokens=torch.tensor(tokens, dtype=torch.int32),
        positions=torch.tensor([position for _, position in places], dtype=torch.int32),
        slots=torch.tensor(slots, dtype=torch.int32),
        block_table=_block_table([chunk.request for chunk in batch.chunks]),
        context_lens=tuple(chunk.positions.stop for chunk in batch.chunks),
        query_starts=tuple(starts),
        logit_rows=_logit_rows(batch, starts),
        carried=carried,
    )


def _logit_rows(batch: Batch, starts: Sequence[int]) -> Tensor | None:
    wanted = [
        row
        for chunk, stop in zip(batch.chunks, starts[1:], strict=True)
        for row in range(stop - chunk.logit_rows, stop)
    ]
    if len(wanted) == starts[-1]:
        return None
    return torch.tensor(wanted or [starts[-1] - 1])


def _block_table(requests: Sequence[Request]) -> Tensor:
    width = max(len(request.block_table) for request in requests)
    rows = [request.block_table + [0] * (width - len(request.block_table)) for request in requests]
    return torch.tensor(rows, dtype=torch.int32)
