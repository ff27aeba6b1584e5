"""How a captured decode step, whose host arguments are fixed, knows how long contexts are.

- `UpdatedLengths`: one graph for each batch size; each replay brings the lengths of its step.
- `MaskedLengths`: one graph for each batch size and each of the lengths 512, 1024, 2048 and so on.
  Attention is captured for contexts that are all so long, and a mask, made on the device of the
  positions once a step, hides what lies behind the end of each. Nothing is left for the host to do,
  and at most twice the keys are read. The shortest are captured when a model is loaded, so that a
  machine that does not capture says so then. The longer ones are captured when a step first needs
  one: that takes the host about as long as three eager steps and a synchronization, whereas all of
  them ahead would take minutes and memory for contexts that most users never have.
"""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from qwen3_ascend.runtime.backends.npu.attention import AttentionStrategy
from qwen3_ascend.runtime.backends.npu.graph_calls import (
    CapturedCalls,
    CapturedGraph,
    Values,
    plain_capture,
)
from qwen3_ascend.runtime.backends.step import DeviceStep

FIRST_LENGTH = 512
"""Tokens of the shortest contexts that masked steps are captured for: with fewer, attention would
be no faster."""

MAX_MASKED_GRAPHS = 64
"""Captured steps that are kept at most: as each holds memory, fewer batch sizes are captured where
a model has many lengths."""

MOST_ELEMENTS = 2**31 - 1
"""Of the keys of a layer: the kernel for one query token counts them with int32 (op-plugin's page
of npu_fused_infer_attention_score)."""


@dataclass(frozen=True)
class GraphBounds:
    """What captured steps keep to.

    Attributes:
        buckets: batch sizes to capture, ascending.
        table_width: blocks of a request at most.
        num_blocks: blocks of the cache.
        block_size: tokens of a block.
    """

    buckets: tuple[int, ...]
    table_width: int
    num_blocks: int
    block_size: int

    def rows(self, count: int) -> int | None:
        """The smallest batch size for so many requests."""
        return next((size for size in self.buckets if size >= count), None)


@dataclass(frozen=True)
class GraphSize:
    """What a step is captured for.

    Attributes:
        rows: requests, padding included.
        length: of each context, as attention is told at the capture.
    """

    rows: int
    length: int


class GraphLengths(Protocol):
    """One way.

    Attributes:
        first_sizes: what is captured when a model is loaded, the largest first, so that the others
            fit into its memory.
    """

    @property
    def first_sizes(self) -> tuple[GraphSize, ...]: ...

    def size(self, context_lens: tuple[int, ...]) -> GraphSize | None:
        """The graph for a step; None if there is none that takes it."""

    def capture(self, pool: Any) -> AbstractContextManager[CapturedGraph]:
        """Captures what is issued within, into the memory of a pool of graphs."""

    def open(self, step: DeviceStep) -> DeviceStep:
        """A step as a captured forward has to get it; runs inside the capture."""

    def values(self, context_lens: tuple[int, ...], size: GraphSize) -> Values:
        """What a replay is given for a step."""


class UpdatedLengths:
    """Each replay brings the lengths of its step."""

    def __init__(
        self, strategy: AttentionStrategy, calls: CapturedCalls, bounds: GraphBounds
    ) -> None:
        self._strategy, self._calls, self._bounds = strategy, calls, bounds

    @property
    def first_sizes(self) -> tuple[GraphSize, ...]:
        """See GraphLengths: all."""
        return tuple(GraphSize(rows, 1) for rows in reversed(self._bounds.buckets))

    def size(self, context_lens: tuple[int, ...]) -> GraphSize | None:
        """See GraphLengths."""
        bounds, rows = self._bounds, self._bounds.rows(len(context_lens))
        if rows is None:
            return None
        lengths = _padded(context_lens, rows)
        if not self._strategy.takes(lengths, bounds.num_blocks, bounds.block_size):
            return None
        return GraphSize(rows, 1)

    def capture(self, pool: Any) -> AbstractContextManager[CapturedGraph]:
        """See GraphLengths."""
        return self._calls.capture(pool)

    def open(self, step: DeviceStep) -> DeviceStep:
        """See GraphLengths: as it is."""
        return step

    def values(self, context_lens: tuple[int, ...], size: GraphSize) -> Values:
        """See GraphLengths."""
        return self._strategy.update(_padded(context_lens, size.rows))


class MaskedLengths:
    """Lengths stay as they were captured, and a mask hides the rest."""

    def __init__(self, bounds: GraphBounds, key_width: int) -> None:
        """`key_width` is the number of elements of a token's keys in a layer."""
        self._bounds, block_size = bounds, bounds.block_size
        counted = bounds.num_blocks * block_size * key_width <= MOST_ELEMENTS
        longest = min(bounds.table_width, bounds.num_blocks)
        self._lengths = masked_lengths(longest, block_size) if counted else ()
        self._places = torch.arange(longest * block_size, dtype=torch.int32).to("npu")

    @property
    def first_sizes(self) -> tuple[GraphSize, ...]:
        """See GraphLengths: those for the shortest contexts."""
        sizes = (GraphSize(rows, length) for length in self._lengths[:1] for rows in self._rows)
        return tuple(size for size in sizes if self._takes(size))

    def size(self, context_lens: tuple[int, ...]) -> GraphSize | None:
        """See GraphLengths. All rows have as many blocks as the longest, for the kernel's count."""
        rows, longest = self._bounds.rows(len(context_lens)), max(context_lens)
        length = next((length for length in self._lengths if length >= longest), None)
        if rows is None or length is None:
            return None
        size = GraphSize(rows, length)
        return size if self._takes(size) else None

    def capture(self, pool: Any) -> AbstractContextManager[CapturedGraph]:
        """See GraphLengths."""
        return plain_capture(pool)

    def open(self, step: DeviceStep) -> DeviceStep:
        """See GraphLengths: with the mask, and with as many blocks as it covers. A token sees its
        own place and all before it."""
        inputs = step.inputs
        length = inputs.context_lens[0]
        blocks = length // self._bounds.block_size
        table = inputs.block_table[:, :blocks].contiguous()
        return dataclasses.replace(
            step,
            inputs=dataclasses.replace(inputs, block_table=table),
            hidden=hidden_places(self._places[:length], inputs.positions),
        )

    def values(self, context_lens: tuple[int, ...], size: GraphSize) -> Values:
        """See GraphLengths: nothing."""
        return {}

    @property
    def _rows(self) -> tuple[int, ...]:
        return tuple(reversed(self._bounds.buckets))

    def _takes(self, size: GraphSize) -> bool:
        return size.rows * size.length <= self._bounds.num_blocks * self._bounds.block_size


def masked_lengths(longest: int, block_size: int) -> tuple[int, ...]:
    """Tokens of the contexts that steps are captured for: FIRST_LENGTH, doubled up to `longest`
    blocks; whole blocks."""
    blocks, lengths = max(1, FIRST_LENGTH // block_size), []
    while blocks < longest:
        lengths.append(blocks * block_size)
        blocks *= 2
    return (*lengths, longest * block_size)


def hidden_places(places: Tensor, positions: Tensor) -> Tensor:
    """The places [longest] that lie behind each of the positions [B]: bool [B, 1, longest]."""
    return (places > positions.unsqueeze(1)).unsqueeze(1)


def _padded(context_lens: tuple[int, ...], rows: int) -> tuple[int, ...]:
    """Rows of padding have a context of one token."""
    return (*context_lens, *(1,) * (rows - len(context_lens)))
