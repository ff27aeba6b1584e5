"""Attention over the paged cache, as exchangeable strategies.

Both keep keys and values in plain order, [blocks, block_size, kv_heads, head_dim]. The fused
qkv + norm + rotary + cache kernel (npu_qkv_rms_norm_rope_cache) is not used: it writes PA_NZ caches
only, and on A2/A3 neither attention kernel reads bf16 grouped-query keys from one.

A captured decode step bakes in one host argument, the context lengths. Each strategy says under
which key torch_npu's graph update takes it, and how it is packed: that is all that the graph
runner needs to know of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch_npu
from torch import Tensor

from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.checkpoint.target import ASCEND_A2_A3
from qwen3_ascend.errors import OptionError
from qwen3_ascend.runtime.backends.cache import LayerKV
from qwen3_ascend.runtime.backends.npu.device import require_atb
from qwen3_ascend.runtime.backends.step import StepInputs

CAUSAL_MASK_SIZE = 2048
"""npu_fused_infer_attention_score wants this triangle for sparse_mode 2 to 4."""

SPARSE_NONE = 0
SPARSE_CAUSAL_BOTTOM_RIGHT = 3

CONTEXT_LENS_SLOT = 7
"""Position of context_lens among the arguments of _npu_paged_attention."""


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
        update_operator: the operator torch_npu records while a decode step is captured.
        update_key: the name under which a replay updates its context lengths.
    """

    name: str
    counts: HeadCounts
    update_operator: str
    update_key: str

    def write(self, key: Tensor, value: Tensor, cache: LayerKV, slots: Tensor) -> None:
        """Stores contiguous [T, kv_heads, head_dim] at the slots."""

    def prefill(self, query: Tensor, cache: LayerKV, step: StepInputs) -> Tensor:
        """Causal attention of chunks whose keys are already in the cache: [T, heads, head_dim]."""

    def decode(self, query: Tensor, cache: LayerKV, step: StepInputs) -> Tensor:
        """One query token for each request: [T, heads, head_dim].

        Inside a capture the workspace is explicit, because the implicit one may be freed or moved
        between replays; all layers share it, since they run one after the other.
        """

    def update(self, context_lens: tuple[int, ...]) -> dict[str, Any]:
        """What a replay of the graph for len(context_lens) rows is given."""


class FusedAttention:
    """npu_fused_infer_attention_score in the TND layout: prefill, chunked prefill and decode."""

    name = "fused"
    update_operator = "npu_fused_infer_attention_score.out"
    update_key = "actual_seq_lengths_kv"

    def __init__(self, counts: HeadCounts) -> None:
        self.counts = counts
        ones = torch.ones(CAUSAL_MASK_SIZE, CAUSAL_MASK_SIZE, dtype=torch.bool)
        self._mask = ones.triu(1).to("npu")
        self._workspaces: dict[int, Tensor] = {}

    def write(self, key: Tensor, value: Tensor, cache: LayerKV, slots: Tensor) -> None:
        """See AttentionStrategy. The operator's default cache mode is PA_NZ: always say Norm."""
        torch_npu.npu_scatter_pa_kv_cache(
            key, value, cache.keys, cache.values, slots, cache_mode="Norm"
        )

    def prefill(self, query: Tensor, cache: LayerKV, step: StepInputs) -> Tensor:
        """Causal attention of a chunk whose keys are already in the cache: [T, heads, head_dim]."""
        arguments = self._arguments(cache, step)
        arguments |= {"atten_mask": self._mask, "sparse_mode": SPARSE_CAUSAL_BOTTOM_RIGHT}
        keys, values = self._flat(cache)
        output: Tensor = torch_npu.npu_fused_infer_attention_score(
            query, keys, values, **arguments
        )[0]
        return output

    def decode(self, query: Tensor, cache: LayerKV, step: StepInputs) -> Tensor:
        """See AttentionStrategy. One token sees its whole context: no mask."""
        inputs, arguments = (query, *self._flat(cache)), self._arguments(cache, step)
        if not torch_npu.npu.is_current_stream_capturing():
            output: Tensor = torch_npu.npu_fused_infer_attention_score(*inputs, **arguments)[0]
            return output
        rows = query.shape[0]
        if rows not in self._workspaces:
            self._workspaces[rows] = torch_npu._npu_fused_infer_attention_score_get_max_workspace(
                *inputs, **arguments
            )
        output = torch.empty_like(query)
        logsumexp = torch.empty(1, dtype=query.dtype, device=query.device)
        torch_npu.npu_fused_infer_attention_score.out(
            *inputs, **arguments, workspace=self._workspaces[rows], out=[output, logsumexp]
        )
        return output

    def update(self, context_lens: tuple[int, ...]) -> dict[str, Any]:
        """See AttentionStrategy: a host list."""
        return {self.update_key: list(context_lens)}

    def _arguments(self, cache: LayerKV, step: StepInputs) -> dict[str, Any]:
        return {
            "input_layout": "TND",
            "num_heads": self.counts.heads,
            "num_key_value_heads": self.counts.kv_heads,
            "scale": self.counts.scale,
            "sparse_mode": SPARSE_NONE,
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
    update_operator = "_npu_paged_attention.default"
    update_key = "context_lens"

    def __init__(self, counts: HeadCounts) -> None:
        require_atb()
        self.counts, self._fused = counts, FusedAttention(counts)
        self._workspace: Tensor | None = None
        self._captured: dict[int, tuple[Any, ...]] = {}

    def write(self, key: Tensor, value: Tensor, cache: LayerKV, slots: Tensor) -> None:
        """See AttentionStrategy."""
        torch_npu._npu_reshape_and_cache(key, value, cache.keys, cache.values, slots)

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
        self._captured.setdefault(query.shape[0], call)
        workspace = self._workspace_for(call)
        torch_npu._npu_paged_attention(*call, workspace=workspace)
        return output

    def update(self, context_lens: tuple[int, ...]) -> dict[str, Any]:
        """See AttentionStrategy: an int32 tensor on the host, and the workspace, whose size
        depends on the lengths and does not grow steadily with them."""
        lengths = torch.tensor(context_lens, dtype=torch.int32)
        call = list(self._captured[len(context_lens)])
        call[CONTEXT_LENS_SLOT] = lengths
        return {self.update_key: lengths, "workspace": self._workspace_for(tuple(call))}

    def _workspace_for(self, call: tuple[Any, ...]) -> Tensor:
        """The shared workspace, replaced by a larger one if this call needs it."""
        needed: Tensor = torch_npu._npu_paged_attention_get_workspace(*call)
        if self._workspace is None or needed.numel() > self._workspace.numel():
            self._workspace = needed
        return self._workspace

    def _call(
        self, query: Tensor, cache: LayerKV, step: StepInputs, output: Tensor
    ) -> tuple[Any, ...]:
        """Positional: torch_npu's graph update finds context_lens by its place, the eighth."""
        lengths = torch.tensor(step.context_lens, dtype=torch.int32)
        return (
            query, cache.keys, cache.values, self.counts.kv_heads, self.counts.heads,
            self.counts.scale, step.block_table, lengths, output,
        )  # fmt: skip


def choose_attention(name: str, config: Qwen3Config) -> AttentionStrategy:
    """The strategy of a name.

    "auto" is "fused": it needs no ATB, serves prefill and decode alike, and states a workspace
    that is enough for every length. "paged" has the smaller kernel at medium batch sizes.

    Raises:
        OptionError: for a head size that the kernels do not take.
        DeviceError: for "paged" without ATB.
    """
    strategies: dict[str, Callable[[HeadCounts], AttentionStrategy]]
    strategies = {"auto": FusedAttention, "fused": FusedAttention, "paged": PagedAttention}
    sizes = ASCEND_A2_A3.head_sizes
    if config.head_dim not in sizes:
        raise OptionError(
            f"head_dim is {config.head_dim}, but npu_fused_infer_attention_score takes "
            f"{', '.join(map(str, sizes))} in the TND layout; run this model with device=cpu"
        )
    return strategies[name](HeadCounts(config.num_heads, config.num_kv_heads, config.head_dim))
