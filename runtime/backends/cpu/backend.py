"""The CPU backend: a layer in a few calls of compiled kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.checkpoint.schemes import Input
from qwen3_ascend.native import Fed, Feed, LayerKernels
from qwen3_ascend.native.layer import PER_TOKEN, STATIC
from qwen3_ascend.runtime.backends.base import (
    Activation,
    DeviceLinear,
    QuantizedActivation,
    StaticActivation,
    static_input_of,
)
from qwen3_ascend.runtime.backends.cache import LayerKV
from qwen3_ascend.runtime.backends.cpu.by_torch import TorchCpuBackend
from qwen3_ascend.runtime.backends.step import DeviceStep, StepInputs


@dataclass(frozen=True)
class CpuStep(DeviceStep):
    """A step with its numbers as the kernels read them.

    Attributes:
        lengths: int32 [B], `context_lens` of the inputs.
        starts: int32 [B + 1], `query_starts` of the inputs.
    """

    lengths: Tensor = torch.empty(0)
    starts: Tensor = torch.empty(0)


class CpuBackend(TorchCpuBackend):
    """Computes what the reference defines, by kernels that take activations as they lie."""

    def __init__(
        self,
        config: Qwen3Config,
        dtype: torch.dtype,
        cache_dtype: torch.dtype | None,
        kernels: LayerKernels,
    ) -> None:
        super().__init__(config, dtype, cache_dtype)
        self._kernels = kernels

    @override
    def open_step(self, step: StepInputs) -> DeviceStep:
        opened = super().open_step(step)
        lengths, starts = (
            torch.tensor(numbers, dtype=torch.int32)
            for numbers in (step.context_lens, step.query_starts)
        )
        return CpuStep(opened.inputs, opened.cos, opened.sin, None, lengths, starts)

    @override
    def add_norm(
        self,
        hidden: Tensor,
        delta: Tensor | None,
        weight: Tensor,
        epsilon: float,
        consumer: DeviceLinear,
    ) -> tuple[Activation, Tensor]:
        fed, total = self._kernels.add_norm(hidden, delta, weight, epsilon, feed_of(consumer))
        return activation(fed, consumer), total

    @override
    def norm_rope_write(
        self,
        qkv: Tensor,
        query_norm: Tensor,
        key_norm: Tensor,
        epsilon: float,
        step: DeviceStep,
        cache: LayerKV,
    ) -> Tensor:
        norms, rotary = (query_norm, key_norm), (step.cos, step.sin)
        return self._kernels.norm_rotate(qkv, norms, epsilon, rotary, step.inputs.slots, cache)

    @override
    def attention(
        self, query: Tensor, step: DeviceStep, cache: LayerKV, consumer: DeviceLinear
    ) -> Activation:
        assert isinstance(step, CpuStep), "a step of another backend"
        fed = self._kernels.attention(
            query, cache, step.inputs.block_table, step.lengths, step.starts, feed_of(consumer)
        )
        return activation(fed, consumer)

    @override
    def logits(self, head: DeviceLinear, x: Activation) -> Tensor:
        """By a kernel: torch would wake its own threads for this, which then look for more work in
        the way of ours."""
        logits = head(x)
        return logits if self.dtype is torch.float32 else self._kernels.widen(logits)

    @override
    def gated(self, gate_up: Tensor, consumer: DeviceLinear) -> Activation:
        return activation(self._kernels.gated(gate_up, feed_of(consumer)), consumer)


def feed_of(consumer: DeviceLinear) -> Feed:
    """What a linear wants to be fed, in the kernels' words."""
    if consumer.input is Input.FLOAT:
        return Feed()
    if consumer.input is Input.INT8_PER_TOKEN:
        return Feed(PER_TOKEN)
    wanted = static_input_of(consumer)
    return Feed(STATIC, wanted.reciprocal, float(wanted.offset))


def activation(fed: Fed, consumer: DeviceLinear) -> Activation:
    """What the kernels made, as the linear takes it."""
    if consumer.input is Input.FLOAT:
        return fed.values
    if fed.scales is None:
        return StaticActivation(fed.values)
    return QuantizedActivation(fed.values, fed.scales)
