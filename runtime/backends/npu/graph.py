"""Decode steps captured once for each batch size, and replayed.

A capture fixes every address and every host argument. Addresses stay right because a step is
copied into static buffers; the one host argument, the context lengths, is updated at each replay.
The order of a replay matters: the captured attention waits for an event, resets it, and only then
may the event be recorded for this step. So the update stream first waits for the compute stream
(where the last replay's reset is), then the graph is launched, then the update is issued.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_npu
from torch import Tensor

from qwen3_ascend.errors import DeviceError
from qwen3_ascend.runtime.backends.base import Forward
from qwen3_ascend.runtime.backends.npu.attention import AttentionStrategy
from qwen3_ascend.runtime.backends.step import StepInputs

WARM_UPS = 2
"""Eager runs before a capture, so that nothing is set up or compiled inside it."""

ALIGNMENT = 16
"""int32 words: each section of the step buffer starts on 64 bytes."""


def decode_buckets(max_batch: int, buckets: Sequence[int] | None = None) -> tuple[int, ...]:
    """Batch sizes to capture, ascending: 1, 2, 4, 8, then every 8, up to max_batch."""
    if buckets is not None:
        return tuple(sorted(set(buckets)))
    sizes = [size for size in (1, 2, 4, *range(8, max_batch, 8)) if size < max_batch]
    return (*sizes, max_batch)


class StepBuffers:
    """The static inputs of decode steps: one host and one device buffer, one copy a step.

    Sections of int32: tokens, positions and slots [rows], block table [rows, width].
    """

    def __init__(self, rows: int, width: int) -> None:
        self.width = width
        section = -(-rows // ALIGNMENT) * ALIGNMENT
        self._starts = (0, section, 2 * section, 3 * section)
        length = 3 * section + rows * width
        self._host = torch.zeros(length, dtype=torch.int32).pin_memory()
        self._sections(self._host, rows)[2].copy_(torch.arange(rows))  # a slot for each row
        self._device = self._host.to("npu")

    @property
    def nbytes(self) -> int:
        """Bytes copied to the device for each step."""
        return self._host.nbytes

    def fill(self, step: StepInputs, bucket: int) -> None:
        """Copies a step in. Rows beyond it are padding: token 0 at position 0, each in its own
        slot of the scratch block."""
        count = len(step.context_lens)
        tokens, positions, slots, table = self._sections(self._host, bucket)
        for section in (tokens, positions, table):
            section.zero_()
        slots.copy_(torch.arange(bucket))
        tokens[:count], positions[:count], slots[:count] = step.tokens, step.positions, step.slots
        table[:count, : step.block_table.shape[1]] = step.block_table
        self._device.copy_(self._host, non_blocking=True)

    def step(self, bucket: int) -> StepInputs:
        """A decode step over `bucket` rows that reads the device buffer."""
        tokens, positions, slots, table = self._sections(self._device, bucket)
        return StepInputs(
            tokens=tokens,
            positions=positions,
            slots=slots,
            block_table=table,
            context_lens=(1,) * bucket,
            query_starts=tuple(range(bucket + 1)),
            logit_rows=None,
        )

    def _sections(self, flat: Tensor, bucket: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tokens, positions, slots, table = self._starts
        return (
            flat[tokens : tokens + bucket],
            flat[positions : positions + bucket],
            flat[slots : slots + bucket],
            flat[table : table + bucket * self.width].view(bucket, self.width),
        )


@dataclass(frozen=True)
class CapturedStep:
    """One bucket: its graph and where it leaves the logits."""

    graph: Any
    logits: Tensor


class GraphRunner:
    """Runs steps: decode from captured graphs where a bucket fits, everything else eagerly."""

    def __init__(
        self,
        forward: Forward,
        strategy: AttentionStrategy,
        buckets: tuple[int, ...],
        table_width: int,
    ) -> None:
        """Checks the update key; captures nothing yet."""
        check_update_key(strategy)
        self._forward, self._strategy = forward, strategy
        self._buckets = buckets
        self._buffers = StepBuffers(buckets[-1], table_width)
        self._captured: dict[int, CapturedStep] = {}
        self._pool = torch_npu.npu.graph_pool_handle()

    def capture(self, progress: Callable[[int], None] = lambda graphs: None) -> None:
        """Captures every bucket, the largest first, so that the others fit into its memory."""
        for bucket in reversed(self._buckets):
            self._captured[bucket] = self._capture(bucket)
            progress(1)

    def __call__(self, step: StepInputs) -> Tensor:
        """Logits of a step, float32 [R, vocab]."""
        count = len(step.context_lens)
        if not step.is_decode or count > self._buckets[-1]:
            return self._forward(step)
        bucket = next(size for size in self._buckets if size >= count)
        captured = self._captured[bucket]
        self._buffers.fill(step, bucket)
        update_stream = captured.graph.graph_dispatch_mode.update_stream
        update_stream.wait_stream(torch_npu.npu.current_stream())
        captured.graph.replay()
        lengths = (*step.context_lens, *(1,) * (bucket - count))
        captured.graph.update(cpu_update_input=[self._strategy.update(lengths)])
        logits = captured.logits[:count]
        return logits if step.logit_rows is None else logits[step.logit_rows]

    def _capture(self, bucket: int) -> CapturedStep:
        step = self._buffers.step(bucket)
        side = torch_npu.npu.Stream()
        side.wait_stream(torch_npu.npu.current_stream())
        with torch_npu.npu.stream(side):
            for _ in range(WARM_UPS):
                self._forward(step)
        torch_npu.npu.current_stream().wait_stream(side)
        torch_npu.npu.synchronize()
        graph = torch_npu.npu.NPUGraph()
        with torch_npu.npu.graph(graph, pool=self._pool, auto_dispatch_capture=True):
            logits = self._forward(step)
        return CapturedStep(graph, logits)


def check_update_key(strategy: AttentionStrategy) -> None:
    """DeviceError unless torch_npu's own table knows the operator and the key.

    NPUGraph.update ignores a key it does not know, and the graph would then wait for ever or
    attend over the lengths of the capture.
    """
    from torch_npu.npu._npugraph_handlers.npugraph_handler import _NPU_GRAPH_OP_HANDLERS

    handler = _NPU_GRAPH_OP_HANDLERS.get(strategy.update_operator)
    specs = handler.get_update_specs(strategy.update_operator) if handler else []
    keys = [key for _, _, key in specs]
    if strategy.update_key not in keys:
        known = ", ".join(keys) or "none"
        raise DeviceError(
            f"torch_npu {torch_npu.__version__} does not update {strategy.update_key!r} of "
            f"{strategy.update_operator} (it knows: {known}); use graph=off"
        )
