"""The inputs of a step to the device: one copy, which the host does not wait for.

A copy from pageable memory makes the host wait until it is done, and with it for everything queued
before. Here all tensors of a step are put side by side in pinned memory and copied at once.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_npu
from torch import Tensor

from qwen3_ascend.runtime.backends.step import StepInputs

ALIGNMENT = 64
"""Bytes: where each tensor begins in the buffer."""

BUFFERS = 2
"""One is filled while the other may be on its way."""

LEAST_BYTES = 1 << 16
"""Of a buffer, so that a prompt a little longer than the last one needs no new one."""


@dataclass
class _Buffer:
    """Pinned memory, and the event after its last copy."""

    memory: Tensor
    event: Any


class PinnedBuffers:
    """Pinned memory for copies that the host does not wait for, used in turn."""

    def __init__(self) -> None:
        self._buffers: deque[_Buffer] = deque()

    def send(self, nbytes: int, fill: Callable[[Tensor], None], device: Tensor) -> None:
        """Copies bytes to the device.

        Args:
            nbytes: how many.
            fill: writes them into pinned memory, uint8 [nbytes], whose content is undefined.
            device: contiguous, of as many bytes.
        """
        buffer = self._buffer(nbytes)
        memory = buffer.memory[:nbytes]
        fill(memory)
        device.view(torch.uint8).copy_(memory, non_blocking=True)
        buffer.event.record()
        self._buffers.append(buffer)

    def _buffer(self, nbytes: int) -> _Buffer:
        """A buffer that no copy reads any more, as large as is needed."""
        if len(self._buffers) < BUFFERS:
            return _Buffer(_pinned(nbytes), torch_npu.npu.Event())
        buffer = self._buffers.popleft()
        buffer.event.synchronize()
        if buffer.memory.numel() < nbytes:
            buffer.memory = _pinned(nbytes)
        return buffer


class StepUploads:
    """Brings steps to the device. The host's tensors may change once a step has been taken."""

    def __init__(self) -> None:
        self._pinned = PinnedBuffers()

    def __call__(self, step: StepInputs) -> StepInputs:
        """A step whose tensors are on the device; one that is there already is returned as it is.

        The tensors are views of one fresh device buffer, so steps do not overwrite each other.
        """
        if step.tokens.device.type == "npu":
            return step
        wanted = [] if step.logit_rows is None else [step.logit_rows]
        tokens, positions, slots, table, *rows = self._move(
            [step.tokens, step.positions, step.slots, step.block_table, *wanted]
        )
        step.fill_in(tokens)
        return dataclasses.replace(
            step,
            tokens=tokens,
            positions=positions,
            slots=slots,
            block_table=table,
            logit_rows=rows[0] if rows else None,
        )

    def _move(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        starts = [0]
        for tensor in tensors:
            starts.append(-(-(starts[-1] + tensor.nbytes) // ALIGNMENT) * ALIGNMENT)

        def fill(memory: Tensor) -> None:
            for tensor, start in zip(tensors, starts, strict=False):
                _section(memory, start, tensor).copy_(tensor)

        device = torch.empty(starts[-1], dtype=torch.uint8, device="npu")
        self._pinned.send(starts[-1], fill, device)
        return [
            _section(device, start, tensor) for tensor, start in zip(tensors, starts, strict=False)
        ]


def _pinned(nbytes: int) -> Tensor:
    return torch.empty(max(nbytes, LEAST_BYTES), dtype=torch.uint8).pin_memory()


def _section(flat: Tensor, start: int, like: Tensor) -> Tensor:
    """The bytes of a tensor in a flat buffer, in its type and shape."""
    return flat[start : start + like.nbytes].view(like.dtype).view(like.shape)
