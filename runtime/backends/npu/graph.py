"""Decode steps captured once for each batch size, and replayed.

A capture fixes every address and every host argument. Addresses stay right because a step is
copied into static buffers; the one host argument, the context lengths, is updated at each replay,
or is the same for all (graph_lengths.py).
The order of an updated replay matters: the captured attention waits for an event, resets it, and
only then may the event be recorded for this step. So the update stream first waits for the compute
stream (where the last replay's reset is), then the graph is launched, then the update is issued.

From the launch on, the device waits for the update. So whatever can be refused is looked at before:
a step that the captured kernel would not take runs eagerly.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch_npu
from torch import Tensor

from qwen3_ascend.errors import DeviceError, DeviceStuckError, OptionError
from qwen3_ascend.runtime.backends.base import Forward
from qwen3_ascend.runtime.backends.npu.device import in_one_line, leave_without_waiting
from qwen3_ascend.runtime.backends.npu.graph_calls import CapturedGraph, Values
from qwen3_ascend.runtime.backends.npu.graph_lengths import GraphBounds, GraphLengths, GraphSize
from qwen3_ascend.runtime.backends.npu.uploads import PinnedBuffers
from qwen3_ascend.runtime.backends.step import StepInputs

WARM_UPS = 2
"""Eager runs before a capture, so that nothing is set up or compiled inside it."""

ALIGNMENT = 16
"""int32 words: each section of the step buffer starts on 64 bytes."""


MAX_STREAMS = 1800
"""Streams that captured graphs may hold together: each attention that a graph updates takes one,
and a card of an older driver has 2048 for everybody (vllm-ascend's bound)."""

STRIDE = 8
"""Between the larger batch sizes that are captured."""


def decode_buckets(
    max_batch: int, buckets: Sequence[int] | None = None, most: int = MAX_STREAMS
) -> tuple[int, ...]:
    """Batch sizes to capture, ascending: 1, 2, 4, 8, then every 8, up to max_batch; every 16 or
    more where those would be too many.

    Args:
        max_batch: the largest.
        buckets: the user's own.
        most: how many there may be.

    Raises:
        OptionError: if the user's own are more than that.
    """
    if buckets is not None:
        chosen = tuple(sorted(set(buckets)))
        if len(chosen) > most:
            raise OptionError(
                f"buckets: {len(chosen)} graphs of this model would hold more than the "
                f"{MAX_STREAMS} streams that a card has for them; choose {most} at most"
            )
        return chosen
    for stride in itertools.count(STRIDE, STRIDE):
        sizes = (1, 2, 4, *range(STRIDE, max_batch, stride))
        found = (*(size for size in sizes if size < max_batch), max_batch)
        if len(found) <= max(most, 5):
            return found
    raise AssertionError("a large stride leaves five sizes")


def largest_padding(buckets: tuple[int, ...]) -> int:
    """Rows that are added to a batch at most."""
    return max(size - smaller - 1 for smaller, size in itertools.pairwise((0, *buckets)))


class StepBuffers:
    """The static inputs of decode steps: one device buffer, one copy a step.

    Sections of int32: tokens, positions and slots [rows], block table [rows, width].
    """

    def __init__(self, rows: int, width: int) -> None:
        self.width = width
        section = -(-rows // ALIGNMENT) * ALIGNMENT
        self._starts = (0, section, 2 * section, 3 * section)
        length = 3 * section + rows * width
        host = torch.zeros(length, dtype=torch.int32)
        self._sections(host, rows)[2].copy_(torch.arange(rows))  # a slot for each row
        self._device, self._pinned = host.to("npu"), PinnedBuffers()

    @property
    def nbytes(self) -> int:
        """Bytes copied to the device for each step."""
        return self._device.nbytes

    def fill(self, step: StepInputs, bucket: int) -> None:
        """Copies a step in. Rows beyond it are padding: token 0 at position 0, each in its own
        slot of the scratch block."""

        def write(memory: Tensor) -> None:
            tokens, positions, slots, table = self._sections(memory.view(torch.int32), bucket)
            for section in (tokens, positions, table):
                section.zero_()
            slots.copy_(torch.arange(bucket))
            count = len(step.context_lens)
            tokens[:count], positions[:count] = step.tokens, step.positions
            slots[:count] = step.slots
            table[:count, : step.block_table.shape[1]] = step.block_table

        self._pinned.send(self.nbytes, write, self._device)
        step.fill_in(self._device)  # tokens come first in it

    def step(self, size: GraphSize) -> StepInputs:
        """A decode step of that size, which reads the device buffer."""
        tokens, positions, slots, table = self._sections(self._device, size.rows)
        return StepInputs(
            tokens=tokens,
            positions=positions,
            slots=slots,
            block_table=table,
            context_lens=(size.length,) * size.rows,
            query_starts=tuple(range(size.rows + 1)),
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
    """A graph and where it leaves the logits."""

    graph: CapturedGraph
    logits: Tensor


class GraphRunner:
    """Runs steps: decode from captured graphs where one fits, everything else eagerly."""

    def __init__(
        self, eager: Forward, captured: Forward, lengths: GraphLengths, bounds: GraphBounds
    ) -> None:
        """Captures nothing yet.

        Args:
            eager: computes a step.
            captured: computes a step that is to be captured.
            lengths: how replays know how long contexts are.
            bounds: of the steps.
        """
        self._eager, self._forward, self._lengths = eager, captured, lengths
        self._buffers = StepBuffers(bounds.buckets[-1], bounds.table_width)
        self._captured: dict[GraphSize, CapturedStep] = {}
        self._pool = torch_npu.npu.graph_pool_handle()
        self._stuck: str | None = None
        self._refused = False

    def capture(self, progress: Callable[[int], None] = lambda graphs: None) -> None:
        """Captures what is wanted from the beginning.

        Raises:
            DeviceError: if the machine does not capture, as with a driver that is too old.
        """
        for size in self._lengths.first_sizes:
            try:
                self._captured[size] = self._capture(size)
            except RuntimeError as error:
                raise DeviceError(
                    f"a step of {size.rows} rows cannot be captured ({in_one_line(error)}); "
                    f"use graph=off"
                ) from error
            progress(1)

    def __call__(self, step: StepInputs) -> Tensor:
        """Logits of a step, float32 [R, vocab].

        Raises:
            DeviceStuckError: if the device waits for a step that cannot be completed.
        """
        if self._stuck:
            raise DeviceStuckError(self._stuck)
        size = self._lengths.size(step.context_lens) if step.is_decode else None
        if size is None:
            return self._eager(step)
        self._buffers.fill(step, size.rows)
        captured = self._captured.get(size) or self._capture_late(size)
        if captured is None:
            return self._eager(step)
        self._replay(captured.graph, self._lengths.values(step.context_lens, size))
        logits = captured.logits[: len(step.context_lens)]
        return logits if step.logit_rows is None else logits[step.logit_rows]

    def _replay(self, graph: CapturedGraph, values: Values) -> None:
        graph.launch()
        try:
            graph.update(values)
        except Exception as error:  # whatever it is, the device waits for what did not come
            self._stuck = (
                f"a captured step did not get its context lengths ({in_one_line(error)}), and the "
                f"device now waits for them for ever: end this process; graph=off does without"
            )
            leave_without_waiting()
            raise DeviceStuckError(self._stuck) from error

    def _capture_late(self, size: GraphSize) -> CapturedStep | None:
        """A graph when it is first needed; None, after a warning, if there is no room for it.

        The warm-ups compute what is in the buffers: this very step, to the same slots.
        """
        if self._refused:
            return None
        try:
            self._captured[size] = self._capture(size)
        except RuntimeError as error:
            self._refused = True
            warnings.warn(
                f"steps of {size.rows} rows and contexts of up to {size.length} tokens are not "
                f"captured ({in_one_line(error)}): they run eagerly, which is slower",
                stacklevel=2,
            )
        return self._captured.get(size)

    def _capture(self, size: GraphSize) -> CapturedStep:
        step = self._buffers.step(size)
        side = torch_npu.npu.Stream()
        side.wait_stream(torch_npu.npu.current_stream())
        with torch_npu.npu.stream(side):
            for _ in range(WARM_UPS):
                self._forward(step)
        torch_npu.npu.current_stream().wait_stream(side)
        torch_npu.npu.synchronize()
        with self._lengths.capture(self._pool) as graph:
            logits = self._forward(step)
        return CapturedStep(graph, logits)
