"""What one step computes: chunks of requests, and the inputs of the forward pass for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3_ascend.runtime.backends.step import StepInputs
from qwen3_ascend.runtime.engine.request import Request


@dataclass(frozen=True)
class Chunk:
    """The next `count` tokens of a request."""

    request: Request
    count: int

    @property
    def positions(self) -> range:
        """Their places in the request."""
        return range(self.request.computed, self.request.computed + self.count)

    @property
    def logit_rows(self) -> int:
        """Of how many of its last rows the logits are wanted: of all, of the last one if a token
        is to be chosen then, or of none."""
        if self.request.wants_logits:
            return self.count
        return int(self.count == self.request.pending)


@dataclass(frozen=True)
class Batch:
    """The chunks of one step, each of another request."""

    chunks: tuple[Chunk, ...]

    @property
    def tokens(self) -> int:
        """Rows of the step."""
        return sum(chunk.count for chunk in self.chunks)


def step_inputs(batch: Batch, block_size: int) -> StepInputs:
    """The inputs of a batch, on the host; all blocks that it writes to are in the block tables.

    The logits are those that the chunks want, in their order; where none are wanted, those of the
    last row, since no kernel takes an empty tensor.
    """
    starts = [0]
    for chunk in batch.chunks:
        starts.append(starts[-1] + chunk.count)
    places = [(chunk.request, p) for chunk in batch.chunks for p in chunk.positions]
    slots = [
        request.block_table[position // block_size] * block_size + position % block_size
        for request, position in places
    ]
    return StepInputs(
        tokens=torch.tensor([request.tokens[position] for request, position in places]),
        positions=torch.tensor([position for _, position in places]),
        slots=torch.tensor(slots, dtype=torch.int32),
        block_table=_block_table([chunk.request for chunk in batch.chunks]),
        context_lens=tuple(chunk.positions.stop for chunk in batch.chunks),
        query_starts=tuple(starts),
        logit_rows=_logit_rows(batch, starts),
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
