"""The CPU backend: a layer in a few calls of compiled kernels, which are recorded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from typing_extensions import override

from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.checkpoint.linear import Linear
from qwen3_ascend.checkpoint.schemes import Input
from qwen3_ascend.native import Fed, Feed, LayerKernels, MixtureKernels
from qwen3_ascend.native.layer import PER_TOKEN, STATIC
from qwen3_ascend.native.tape import empty, note
from qwen3_ascend.runtime.backends.base import (
    Activation,
    DeviceExperts,
    DeviceForward,
    DeviceLinear,
    Forward,
    Mixture,
    Progress,
    QuantizedActivation,
    StaticActivation,
    StepBounds,
    static_input_of,
)
from qwen3_ascend.runtime.backends.cache import LayerKV
from qwen3_ascend.runtime.backends.cpu.by_torch import TorchCpuBackend
from qwen3_ascend.runtime.backends.cpu.experts import StoredExperts, load_experts
from qwen3_ascend.runtime.backends.cpu.float_linears import StoredFloatLinear, dense
from qwen3_ascend.runtime.backends.cpu.linears import (
    LINEARS,
    GroupInt4Linear,
    Int8Linear,
    StaticInt8Linear,
)
from qwen3_ascend.runtime.backends.cpu.rotary import GrowingTable
from qwen3_ascend.runtime.backends.cpu.steps import CpuStep, RecordedSteps
from qwen3_ascend.runtime.backends.reference import make_linear
from qwen3_ascend.runtime.backends.step import DeviceStep, StepInputs

RECORDED = (Int8Linear, StaticInt8Linear, GroupInt4Linear, StoredFloatLinear)
"""Linears that compute by kernels alone, whose calls can be made again."""


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
        self._kernels, self._records = kernels, True
        self._mixtures = MixtureKernels(kernels.library)
        self._one_by_one: dict[StoredExperts, DeviceExperts] = {}
        self._rotary = GrowingTable(self.rotary_rows)

    @override
    def linear(self, linear: Linear) -> DeviceLinear:
        return self._noted(make_linear(LINEARS, linear, self))

    @override
    def experts(self, linear: Linear) -> DeviceExperts:
        experts = load_experts(linear, self.dtype)
        if experts is None:
            self._records = False  # those that are computed one by one differ from step to step
            return super().experts(linear)
        return experts

    @override
    def dense_experts(self, weights: Sequence[Tensor]) -> DeviceExperts:
        self._records = False
        return super().dense_experts(weights)

    @override
    def dense(self, weight: Tensor, bias: Tensor | None = None) -> DeviceLinear:
        return self._noted(dense(weight, bias))

    def _noted(self, linear: DeviceLinear) -> DeviceLinear:
        """A linear of torch's cannot be recorded, and no step with it."""
        self._records = self._records and isinstance(linear, RECORDED)
        return linear

    @override
    def runner(self, forward: DeviceForward, bounds: StepBounds, progress: Progress) -> Forward:
        if not self._records:
            return super().runner(forward, bounds, progress)
        return RecordedSteps(forward, self.open_step)

    @override
    def embed(self, tokens: Tensor, table: Tensor) -> Tensor:
        rows = empty(len(tokens), table.shape[1], dtype=table.dtype)
        look_up(table, tokens, rows)
        note(look_up, table, tokens, rows)
        return rows

    @override
    def rotary(self, step: StepInputs) -> tuple[Tensor, Tensor]:
        return self._rotary.rows(step.positions, max(step.context_lens))

    @override
    def open_step(self, step: StepInputs) -> CpuStep:
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
    def most_probable(self, logits: Tensor) -> Tensor:
        return self._kernels.largest_places(logits)

    @override
    def mixture(self, x: Tensor, mixture: Mixture) -> Tensor:
        first, second = mixture.gate_up, mixture.down
        if not isinstance(first, StoredExperts) or not isinstance(second, StoredExperts):
            apart = replace(mixture, gate_up=self._apart(first), down=self._apart(second))
            return super().mixture(x, apart)
        kernels, logits = self._mixtures, mixture.router(x)
        routed = kernels.route(logits, mixture.per_token, mixture.normalize)
        fed = kernels.gather(self._kernels.fed(x, feed_of(first)), routed)
        gated = self._kernels.gated(first.product(fed, routed), feed_of(second))
        return kernels.combine(second.product(gated, routed), routed)

    def _apart(self, experts: DeviceExperts) -> DeviceExperts:
        """Experts one by one, where those that they belong with have no kernel."""
        if not isinstance(experts, StoredExperts):
            return experts
        if experts not in self._one_by_one:
            self._one_by_one[experts] = super().experts(experts.linear)
        return self._one_by_one[experts]

    @override
    def gated(self, gate_up: Tensor, consumer: DeviceLinear) -> Activation:
        return activation(self._kernels.gated(gate_up, feed_of(consumer)), consumer)


def look_up(table: Tensor, tokens: Tensor, rows: Tensor) -> None:
    """Writes the rows [T, hidden] of a table that tokens [T] name."""
    torch.index_select(table, 0, tokens, out=rows)


def feed_of(consumer: DeviceLinear | DeviceExperts) -> Feed:
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
