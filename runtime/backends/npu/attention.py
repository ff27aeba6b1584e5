"""Attention over the paged cache, as exchangeable strategies.

Both keep keys and values in plain order, [blocks, block_size, kv_heads, head_dim]. The fused
qkv + norm + rotary + cache kernel (npu_qkv_rms_norm_rope_cache) is not used: it writes PA_NZ caches
only, and on A2/A3 neither attention kernel reads bf16 grouped-query keys from one.

A captured decode step bakes in one host argument, the context lengths. Each strategy says which
argument that is, and how it is packed: that is all that the graph runner needs to know of it. Or
the lengths stay as they are, and what lies behind the end of each context is masked on the device.

The fused kernel refuses a batch whose requests have more blocks together than the cache has, a
block that they share counted for each of them (prompt_flash_attention_tiling.cpp: "the first dim of
key should not less than valid block num when PA enable"). Such a batch is computed in parts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch_npu
from torch import Tensor

from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.checkpoint.target import ASCEND_A2_A3
from qwen3_ascend.errors import DeviceError, OptionError
from qwen3_ascend.runtime.backends.cache import LayerKV
from qwen3_ascend.runtime.backends.npu.capabilities import (
    Capabilities,
)
from qwen3_ascend.runtime.backends.npu.decoding import Decoding
from qwen3_ascend.runtime.backends.npu.graph_calls import CapturedCalls
from qwen3_ascend.runtime.backends.npu.graph_updates import (
    CONTEXT_LENS_PLACE,
    FUSED_LENGTHS,
    PAGED_LENGTHS,
    UpdatedArgument,
)
from qwen3_ascend.runtime.backends.npu.operators import (
    CacheWrite,
    masked_attention,
    reshape_and_cache,
)
from qwen3_ascend.runtime.backends.step import StepInputs

CAUSAL_MASK_SIZE = 2048
"""npu_fused_infer_attention_score wants this triangle for sparse_mode 2 to 4."""

SPARSE_NONE = 0
SPARSE_CAUSAL_BOTTOM_RIGHT = 3


@dataclass(frozen=True)
class HeadCounts:
    """Heads and their size, and the scale 1 / sqrt(head_dim)."""

    heads: int
    kv_heads: int
    head_dim: int

    @property
    def scale(self) -> float:
        """Of the logits; both kernels default to another."""
        return 1.0 / math.sqrt(self.head_dim)


class AttentionStrategy(Protocol):
    """How keys are written and attention is computed.

    Attributes:
        name: as the user chooses it.
        counts: of the model's heads.
        lengths: the argument that each replay of a captured decode step replaces.
        write: stores contiguous keys and values [T, kv_heads, head_dim] at their slots.
    """

    name: str
    counts: HeadCounts
    lengths: UpdatedArgument
    write: CacheWrite

    def prefill(self, query: Tensor, cache: LayerKV, step: StepInputs) -> Tensor:
        """Causal attention of chunks whose keys are already in the cache: [T, heads, head_dim]."""

    def decode(self, query: Tensor, cache: LayerKV, step: StepInputs) -> Tensor:
        """One query token for each request: [T, heads, head_dim].

        Inside a capture the workspace is explicit, because the implicit one may be freed or moved
        between replays; all layers and all graphs share it, since they run one after the other.
        """

    def decode_masked(
        self, query: Tensor, cache: LayerKV, step: StepInputs, hidden: Tensor
    ) -> Tensor:
        """The same, but of all the blocks in the step's table, without the places that are hidden
        [B, 1, places]."""

    def takes(self, context_lens: tuple[int, ...], num_blocks: int, block_size: int) -> bool:
        """Whether one call takes such contexts in a cache of so many blocks."""

    def update(self, context_lens: tuple[int, ...]) -> dict[str, Any]:
        """What a replay of the graph for len(context_lens) rows is given."""


class Workspaces:
    """Scratch memory of captured attention, which graphs share.

    A graph may use a workspace that was there when it was captured, and one that is made outside of
    all captures. Another graph's lies, if it came later, where this one keeps its activations: all
    graphs take their memory from one pool. A small batch may need more than a large one, because
    long contexts are then divided among cores.
    """

    def __init__(self) -> None:
        self._largest: Tensor | None = None
        self._of_rows: dict[int, Tensor] = {}

    def of(self, rows: int) -> Tensor:
        """That of the graph for so many rows."""
        return self._of_rows[rows]

    def enough(self, rows: int, needed: Tensor) -> Tensor:
        """One for the graph of so many rows: its own, or the largest there is; or, where neither is
        enough, the one that was made for this call."""
        own = self._of_rows.get(rows, self._largest)
        if own is None or own.nbytes < needed.nbytes:
            own = self._largest = needed
        self._of_rows[rows] = own
        return own


class FusedAttention:
    """npu_fused_infer_attention_score in the TND layout: prefill, chunked prefill and decode."""

    name = "fused"
    lengths = FUSED_LENGTHS

    def __init__(self, counts: HeadCounts, write: CacheWrite, calls: CapturedCalls) -> None:
        """`calls` is how a captured decode step is given other lengths."""
        self.counts, self.write, self._calls = counts, write, calls
        ones = torch.ones(CAUSAL_MASK_SIZE, CAUSAL_MASK_SIZE, dtype=torch.bool)
        self._mask = ones.triu(1).to("npu")
        self._workspaces = Workspaces()

    def prefill(self, query: Tensor, cache: LayerKV, step: StepInputs) -> Tensor:
        """Causal attention of chunks whose keys are already in the cache: [T, heads, head_dim]."""
        return self._in_parts(
            query, cache, step, atten_mask=self._mask, sparse_mode=SPARSE_CAUSAL_BOTTOM_RIGHT
        )

    def decode(self, query: Tensor, cache: LayerKV, step: StepInputs) -> Tensor:
        """See AttentionStrategy. One token sees its whole context: no mask."""
        if not torch_npu.npu.is_current_stream_capturing():
            return self._in_parts(query, cache, step, sparse_mode=SPARSE_NONE)
        inputs = (query, *self._flat(cache))
        arguments = self._arguments(cache, step) | {"sparse_mode": SPARSE_NONE}
        output = torch.empty_like(query)
        logsumexp = torch.empty(1, dtype=query.dtype, device=query.device)
        self._calls.issue(
            torch_npu.npu_fused_infer_attention_score.out,
            inputs,
            arguments
            | {"workspace": self._workspace_for(inputs, arguments), "out": [output, logsumexp]},
        )
        return output

    def decode_masked(
        self, query: Tensor, cache: LayerKV, step: StepInputs, hidden: Tensor
    ) -> Tensor:
        """See AttentionStrategy: the kernel for one query token, which takes full masks."""
        return masked_attention(query, cache, step.block_table, hidden)

    def takes(self, context_lens: tuple[int, ...], num_blocks: int, block_size: int) -> bool:
        """See AttentionStrategy: as many blocks as all contexts have, one by one."""
        return sum(-(-length // block_size) for length in context_lens) <= num_blocks

    def update(self, context_lens: tuple[int, ...]) -> dict[str, Any]:
        """See AttentionStrategy: a host list, and the workspace that the graph has."""
        workspace = self._workspaces.of(len(context_lens))
        return {self.lengths.key: list(context_lens), "workspace": workspace}

    def _workspace_for(self, inputs: tuple[Tensor, ...], arguments: dict[str, Any]) -> Tensor:
        """One that is enough for every length."""
        needed: Tensor = torch_npu._npu_fused_infer_attention_score_get_max_workspace(
            *inputs, **arguments
        )
        return self._workspaces.enough(inputs[0].shape[0], needed)

    def _in_parts(self, query: Tensor, cache: LayerKV, step: StepInputs, **mask: Any) -> Tensor:
        """Nearly always one call; see the top of this file."""
        keys, values = self._flat(cache)
        outputs: list[Tensor] = []
        for part in split_step(step, *cache.keys.shape[:2]):
            rows = query[part.rows.start : part.rows.stop]
            arguments = self._arguments(cache, part.step) | mask
            attended = torch_npu.npu_fused_infer_attention_score(rows, keys, values, **arguments)
            outputs.append(attended[0])
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _arguments(self, cache: LayerKV, step: StepInputs) -> dict[str, Any]:
        return {
            "input_layout": "TND",
            "num_heads": self.counts.heads,
            "num_key_value_heads": self.counts.kv_heads,
            "scale": self.counts.scale,
            "block_table": step.block_table,
            "block_size": cache.keys.shape[1],
            "actual_seq_lengths": list(step.query_starts[1:]),
            "actual_seq_lengths_kv": list(step.context_lens),
        }

    @staticmethod
    def _flat(cache: LayerKV) -> tuple[Tensor, Tensor]:
        return cache.keys.flatten(2), cache.values.flatten(2)


class PagedAttention:
    """_npu_paged_attention of ATB for decode; prefill stays with the fused kernel."""

    name = "paged"
    lengths = PAGED_LENGTHS

    def __init__(self, counts: HeadCounts, calls: CapturedCalls) -> None:
        """`calls` is how a captured decode step is given other lengths."""
        self.counts, self._calls = counts, calls
        self.write: CacheWrite = reshape_and_cache
        self._fused = FusedAttention(counts, self.write, calls)
        self._workspaces = Workspaces()
        self._captured: dict[int, list[Any]] = {}

    def prefill(self, query: Tensor, cache: LayerKV, step: StepInputs) -> Tensor:
        """See AttentionStrategy: the other kernel's."""
        return self._fused.prefill(query, cache, step)

    def decode(self, query: Tensor, cache: LayerKV, step: StepInputs) -> Tensor:
        """See AttentionStrategy."""
        output = torch.empty_like(query)
        call = self._call(query, cache, step, output)
        if not torch_npu.npu.is_current_stream_capturing():
            torch_npu._npu_paged_attention(*call)
            return output
        self._captured.setdefault(query.shape[0], [*call])
        workspace = self._workspace_for(call)
        self._calls.issue(_paged_overload(), call, {"workspace": workspace})
        return output

    def decode_masked(
        self, query: Tensor, cache: LayerKV, step: StepInputs, hidden: Tensor
    ) -> Tensor:
        """See AttentionStrategy: the other kernel's, ATB's takes no such mask."""
        return self._fused.decode_masked(query, cache, step, hidden)

    def takes(self, context_lens: tuple[int, ...], num_blocks: int, block_size: int) -> bool:
        """See AttentionStrategy: ATB is not known to count blocks."""
        return True

    def update(self, context_lens: tuple[int, ...]) -> dict[str, Any]:
        """See AttentionStrategy: an int32 tensor on the host, and the workspace, whose size
        depends on the lengths and does not grow steadily with them."""
        lengths = torch.tensor(context_lens, dtype=torch.int32)
        call = self._captured[len(context_lens)]
        call[CONTEXT_LENS_PLACE] = lengths
        return {self.lengths.key: lengths, "workspace": self._workspace_for(call)}

    def _workspace_for(self, call: Sequence[Any]) -> Tensor:
        """The workspace of such a graph, replaced by a larger one if this call needs it."""
        needed: Tensor = torch_npu._npu_paged_attention_get_workspace(*call)
        return self._workspaces.enough(call[0].shape[0], needed)

    def _call(
        self, query: Tensor, cache: LayerKV, step: StepInputs, output: Tensor
    ) -> tuple[Any, ...]:
        """Positional: torch_npu's graph update finds context_lens by its place."""
        lengths = torch.tensor(step.context_lens, dtype=torch.int32)
        return (
            query, cache.keys, cache.values, self.counts.kv_heads, self.counts.heads,
            self.counts.scale, step.block_table, lengths, output,
        )  # fmt: skip


def _paged_overload() -> Callable[..., Any]:
    """The operator itself, if it is where newer wheels have it: torch_npu's function looks for ATB
    and chooses an overload at each call."""
    operator = getattr(torch.ops.atb, "_npu_paged_attention", torch_npu._npu_paged_attention)
    overload: Callable[..., Any] = getattr(operator, "default", operator)
    return overload


@dataclass(frozen=True)
class StepPart:
    """Some requests of a step: the rows that they are in it, and the step that they make alone."""

    rows: range
    step: StepInputs


def split_step(step: StepInputs, num_blocks: int, block_size: int) -> Iterator[StepPart]:
    """Parts of a step in its order, each with no more blocks than the cache has."""
    first, held = 0, 0
    for index, length in enumerate(step.context_lens):
        blocks = -(-length // block_size)
        if held + blocks > num_blocks and index > first:
            yield _part(step, first, index)
            first, held = index, 0
        held += blocks
    yield _part(step, first, len(step.context_lens))


def _part(step: StepInputs, first: int, last: int) -> StepPart:
    start, stop = step.query_starts[first], step.query_starts[last]
    if last - first == len(step.context_lens):
        return StepPart(range(start, stop), step)
    return StepPart(
        range(start, stop),
        dataclasses.replace(
            step,
            block_table=step.block_table[first:last],
            context_lens=step.context_lens[first:last],
            query_starts=tuple(row - start for row in step.query_starts[first : last + 1]),
        ),
    )


def open_attention(
    decoding: Decoding, config: Qwen3Config, capabilities: Capabilities, calls: CapturedCalls
) -> AttentionStrategy:
    """The strategy that was chosen.

    Raises:
        OptionError: for a head size that the kernels do not take.
        DeviceError: for "paged" without ATB.
    """
    sizes = ASCEND_A2_A3.head_sizes
    if config.head_dim not in sizes:
        raise OptionError(
            f"head_dim is {config.head_dim}, but npu_fused_infer_attention_score takes "
            f"{', '.join(map(str, sizes))} in the TND layout; run this model with device=cpu"
        )
    counts = HeadCounts(config.num_heads, config.num_kv_heads, config.head_dim)
    if decoding.attention == "fused":
        return FusedAttention(counts, capabilities.cache_write.call, calls)
    if not capabilities.paged.usable:
        raise DeviceError(capabilities.paged.detail)
    return PagedAttention(counts, calls)
