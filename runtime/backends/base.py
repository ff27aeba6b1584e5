"""What a device must be able to do; `reference.py` is the readable definition of every method.

The methods are as large as the largest fused operator a device may have for them, so that a
backend can launch one kernel where another composes five. A result that only the next linear reads
is made for that linear (`consumer`): its producer feeds it what it wants, in the same launch where
a kernel can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from qwen3_ascend.checkpoint.config import ExpertsConfig
from qwen3_ascend.checkpoint.linear import Linear
from qwen3_ascend.checkpoint.schemes import Input
from qwen3_ascend.checkpoint.schemes.w8a8_static import StaticInput
from qwen3_ascend.runtime.backends.step import DeviceStep, StepInputs

Cache = TypeVar("Cache")
"""The cache of one layer, in the form that its backend has chosen."""


@dataclass(frozen=True)
class QuantizedActivation:
    """What a linear is fed that multiplies integers.

    Attributes:
        codes: int8 [T, K].
        scale: float32 [T].
    """

    codes: Tensor
    scale: Tensor


@dataclass(frozen=True)
class StaticActivation:
    """What a linear is fed that has fixed its scale and offset beforehand.

    Attributes:
        codes: int8 [T, K].
    """

    codes: Tensor


Activation = Tensor | QuantizedActivation | StaticActivation
"""Input of a linear [T, K], as it wants to be fed."""


def as_float(x: Activation) -> Tensor:
    """The input of a linear that wants floats; AssertionError if it was fed something else."""
    assert isinstance(x, Tensor), "a float linear was fed codes"
    return x


def as_codes(x: Activation) -> QuantizedActivation:
    """The input of a linear that wants codes; AssertionError if it was fed something else."""
    assert isinstance(x, QuantizedActivation), "an integer linear was fed floats"
    return x


def as_static(x: Activation) -> Tensor:
    """The codes of the input of a linear that wants static ones; AssertionError if it was fed
    something else."""
    assert isinstance(x, StaticActivation), "a linear with a static input was fed something else"
    return x.codes


Forward = Callable[[StepInputs], Tensor]
"""A step from the host to logits float32 [R, vocab]."""

DeviceForward = Callable[[DeviceStep], Tensor]
"""A step on the device to logits float32 [R, vocab]."""

Download = Callable[[], Tensor]
"""Waits for a tensor that is on its way to the host, and gives it."""

Progress = Callable[[str, int, int], None]
"""(what, done, total), for whoever shows it."""


@dataclass(frozen=True)
class StepBounds:
    """What steps keep to.

    Attributes:
        max_batch: requests in a step.
        block_size: tokens in a block of the cache.
        num_blocks: blocks that requests have together, the scratch block included.
    """

    max_batch: int
    block_size: int
    num_blocks: int


class DeviceLinear(Protocol):
    """A linear on its device.

    Attributes:
        input: what it wants to be fed.
        weight: what a prefetch is told of.
    """

    input: Input
    weight: Tensor

    def __call__(self, x: Activation) -> Tensor:
        """[T, N] in the compute type, of an input [T, K] as it wants it."""


class DeviceExperts(Protocol):
    """A linear of every expert of a layer, on its device.

    Attributes:
        input: what it wants to be fed.
        weight: what a prefetch is told of.
    """

    @property
    def input(self) -> Input: ...

    @property
    def weight(self) -> Tensor: ...


SeeExpert = Callable[[int, Tensor], None]
"""Is shown the inputs [rows, K] of an expert, by its number; there is at least one row."""


@dataclass(frozen=True)
class Mixture:
    """The mixture of experts of a layer, on its device.

    Attributes:
        router: of floats; its outputs [T, experts] say which experts a token is given to.
        gate_up, down: of each expert.
        per_token: experts of a token.
        normalize: whether the weights of a token's experts are divided by their sum.
    """

    router: DeviceLinear
    gate_up: DeviceExperts
    down: DeviceExperts
    per_token: int
    normalize: bool

    @classmethod
    def of(
        cls,
        experts: ExpertsConfig | None,
        router: DeviceLinear,
        gate_up: DeviceExperts,
        down: DeviceExperts,
    ) -> Mixture:
        """As a model's configuration has it."""
        assert experts is not None, "only models with experts have such layers"
        return cls(router, gate_up, down, experts.per_token, experts.normalize)


@runtime_checkable
class StaticConsumer(Protocol):
    """A DeviceLinear whose `input` is INT8_STATIC.

    Attributes:
        static_input: how its producers quantize.
    """

    static_input: StaticInput


def static_input_of(consumer: DeviceLinear | DeviceExperts) -> StaticInput:
    """How a linear with a static input wants it; AssertionError if it is no such linear."""
    assert isinstance(consumer, StaticConsumer), "this linear has no static input"
    return consumer.static_input


class Backend(Protocol[Cache]):
    """A device, for one model; made once in `load` and handed down by constructors.

    Attributes:
        name: "cpu", "npu" or "reference".
        device: where tensors live.
        dtype: of activations and the cache.
        runs_ahead: whether a step may be given to it before the tokens of the last one are read,
            because it computes on its own.
        in_place: whether it may compute with weights where they lie in the mapped files, so that
            there is no copy before which they could be checked.
    """

    name: str
    device: torch.device
    dtype: torch.dtype
    runs_ahead: bool = False
    in_place: bool = False

    def upload(self, tensor: Tensor) -> Tensor:
        """A plain weight (norm, embedding) on the device, in the compute type."""

    def linear(self, linear: Linear) -> DeviceLinear:
        """A stored linear on the device; CheckpointError if it has no kernel for the scheme."""

    def experts(self, linear: Linear) -> DeviceExperts:
        """A stored linear of all experts of a layer, [experts, N, K], on the device;
        CheckpointError if it has no kernel for the scheme."""

    def dense_experts(self, weights: Sequence[Tensor]) -> DeviceExperts:
        """A linear of all experts of a layer, of floats [N, K] that were uploaded, uncopied."""

    def watched_experts(self, experts: DeviceExperts, see: SeeExpert) -> DeviceExperts:
        """The linears of `dense_experts`, which show what each expert is fed."""

    def dense(self, weight: Tensor, bias: Tensor | None = None) -> DeviceLinear:
        """A linear of floats that were uploaded, uncopied: a weight [N, K], such as the embedding
        that serves as output projection, and a bias [N]."""

    def allocate_cache(self, bounds: StepBounds) -> tuple[Cache, ...]:
        """The key/value cache, one for each layer, with the blocks of the bounds at least."""

    def cache_bytes_per_token(self) -> int:
        """Cache bytes of one token over all layers."""

    def memory_for_cache(self) -> int:
        """Bytes that the key/value cache may take by default."""

    def open_step(self, step: StepInputs) -> DeviceStep:
        """The step on the device, with what all layers read of it."""

    def download(self, tensor: Tensor) -> Download:
        """Begins to copy a tensor to the host, after all that the device was given before."""
        return tensor.cpu

    def runner(self, forward: DeviceForward, bounds: StepBounds, progress: Progress) -> Forward:
        """The forward as it is to be called: with steps from the host, captured if that pays."""

    def embed(self, tokens: Tensor, table: Tensor) -> Tensor:
        """Rows [T, hidden] of the embedding table."""

    def add_norm(
        self,
        hidden: Tensor,
        delta: Tensor | None,
        weight: Tensor,
        epsilon: float,
        consumer: DeviceLinear,
    ) -> tuple[Activation, Tensor]:
        """(RMS norm of hidden + delta, for the consumer; hidden + delta)."""

    def norm_rope_write(
        self,
        qkv: Tensor,
        query_norm: Tensor,
        key_norm: Tensor,
        epsilon: float,
        step: DeviceStep,
        cache: Cache,
    ) -> Tensor:
        """Splits q|k|v [T, ...], norms and rotates q and k, and writes k and v to the cache.

        Returns:
            Queries [T, heads, head_dim].
        """

    def attention(
        self, query: Tensor, step: DeviceStep, cache: Cache, consumer: DeviceLinear
    ) -> Activation:
        """Causal attention of each request over its cache: [T, heads * head_dim], for the
        consumer."""

    def gated(self, gate_up: Tensor, consumer: DeviceLinear) -> Activation:
        """silu(gate) * up of [T, 2 * inner], for the consumer."""

    def mixture(self, x: Tensor, mixture: Mixture) -> Tensor:
        """The sum of the outputs of each token's experts, times their weights.

        Args:
            x: [T, hidden], as floats.
            mixture: of the layer.

        Returns:
            [T, hidden] in the compute type.
        """

    def logits(self, head: DeviceLinear, x: Activation) -> Tensor:
        """float32 [R, vocab] of the output projection, which rounds them to the compute type."""
        return head(x).float()

    def most_probable(self, logits: Tensor) -> Tensor:
        """int64 [R], the token of the largest of each row of logits float32 [R, vocab]."""
        return logits.argmax(dim=-1)

    def finish_loading(self) -> None:
        """All weights have been asked for; gives back what only loading needs."""
        return

    def prefetch(self, linears: tuple[DeviceLinear, ...], after: Activation) -> None:
        """Hints that these weights are needed soon after `after` is computed."""

    def join_prefetch(self) -> None:
        """Ends what `prefetch` began on another stream."""
