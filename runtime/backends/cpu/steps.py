"""Steps of decoding that are recorded once and made again, as a device replays its graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3_ascend.native.tape import Tape, recording
from qwen3_ascend.native.threads import kernel_threads
from qwen3_ascend.runtime.backends.base import DeviceForward
from qwen3_ascend.runtime.backends.step import DeviceStep, StepInputs

MOST_RECORDED = 8
"""Steps that are kept: for other batches, or for contexts of other lengths, another is recorded."""


@dataclass(frozen=True)
class CpuStep(DeviceStep):
    """A step with its numbers as the kernels read them.

    Attributes:
        lengths: int32 [B], `context_lens` of the inputs.
        starts: int32 [B + 1], `query_starts` of the inputs.
    """

    lengths: Tensor = torch.empty(0)
    starts: Tensor = torch.empty(0)

    def take(self, other: CpuStep) -> None:
        """Becomes another step of the same shape, where this one lies."""
        for name in ("tokens", "positions", "slots", "block_table"):
            getattr(self.inputs, name).copy_(getattr(other.inputs, name))
        for name in ("cos", "sin", "lengths"):
            getattr(self, name).copy_(getattr(other, name))


@dataclass(frozen=True)
class Recorded:
    """A step that was computed once.

    Attributes:
        step: its inputs; another step is copied into them.
        tape: all that was called.
        logits: float32 [B, vocab], that they come to; overwritten by the next replay.
    """

    step: CpuStep
    tape: Tape
    logits: Tensor


class RecordedSteps:
    """A forward that records each shape of a decoding step, and replays it from then on.

    The shape of a step are its requests, the width of their block table, and the threads that share
    the work. Other steps, such as those that read prompts, are computed as they come.
    """

    def __init__(self, forward: DeviceForward, opened: Callable[[StepInputs], CpuStep]) -> None:
        """Records nothing yet.

        Args:
            forward: of the model, by operations that note what they call.
            opened: a step from the host, as the kernels read it.
        """
        self._forward, self._open = forward, opened
        self._recorded: dict[tuple[int, ...], Recorded] = {}

    def __call__(self, inputs: StepInputs) -> Tensor:
        """The logits of a step, float32 [R, vocab]; a later step may overwrite them."""
        step = self._open(inputs)
        if not inputs.is_decode or inputs.logit_rows is not None:
            return self._forward(step)
        shape = *inputs.block_table.shape, kernel_threads()
        recorded = self._recorded.pop(shape, None)
        if recorded is None:
            recorded = self._record(step)
        else:
            recorded.step.take(step)
            recorded.tape.replay()
        self._recorded[shape] = recorded  # the last used is the last
        while len(self._recorded) > MOST_RECORDED:
            del self._recorded[next(iter(self._recorded))]
        return recorded.logits

    def _record(self, step: CpuStep) -> Recorded:
        with recording() as tape:
            return Recorded(step, tape, self._forward(step))
