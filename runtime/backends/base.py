"""What a device must be able to do. The CPU backend is the readable definition of every method.

The methods are as large as the largest fused operator a device may have for them, so that a
backend can launch one kernel where another composes five. A result that only the next linear reads
(`consumer`) may be in whatever form that linear wants; the model passes it on unseen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.checkpoint.linear import Linear
from qwen3_ascend.runtime.backends.cache import LayerKV
from qwen3_ascend.runtime.backends.step import StepInputs

Activation = Any
"""Input of a linear as its backend prepared it: a tensor [T, K], or codes and scales."""

Rotary = Any
"""Cosines and sines of the tokens of one step, in the form that the backend wants."""


Forward = Callable[[StepInputs], Tensor]
"""A step to logits float32 [R, vocab]."""


Progress = Callable[[str, int, int], None]
"""(what, done, total), for whoever shows it."""


@dataclass(frozen=True)
class CacheShape:
    """The bounds a captured step must fit: sequences in a batch, tokens in a block."""

    max_batch: int
    block_size: int


class DeviceLinear(Protocol):
    """A linear on its device."""

    def prepare(self, x: Tensor) -> Activation:
        """What the linear wants of a float input [T, K]: the same tensor, or codes and scales."""

    def __call__(self, x: Activation) -> Tensor:
        """[T, N] in the compute type, of a tensor [T, K] or what the backend prepared for it."""


class Backend(Protocol):
    """A device; made once in `load` and handed down by constructors.

    Attributes:
        name: "cpu" or "npu".
        device: where tensors live.
        dtype: of activations and the cache.
    """

    name: str
    device: torch.device
    dtype: torch.dtype

    def upload(self, tensor: Tensor) -> Tensor:
        """A plain weight (norm, embedding) on the device, in the compute type."""

    def linear(self, linear: Linear) -> DeviceLinear:
        """A stored linear on the device; CheckpointError if it has no kernel for the scheme."""

    def tied_head(self, embedding: Tensor) -> DeviceLinear:
        """The output projection that an uploaded embedding [vocab, hidden] serves as, uncopied."""

    def to_device(self, step: StepInputs) -> StepInputs:
        """The step with its tensors on the device."""

    def runner(self, forward: Forward, shape: CacheShape, progress: Progress) -> Forward:
        """The forward as it is to be called: with steps from the host, captured if that pays."""

    def rotary(self, config: Qwen3Config, step: StepInputs) -> Rotary:
        """Cosines and sines for the step's positions."""

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
        """(RMS norm of hidden + delta, prepared for the consumer; hidden + delta)."""

    def norm_rope_write(
        self,
        qkv: Tensor,
        query_norm: Tensor,
        key_norm: Tensor,
        epsilon: float,
        rotary: Rotary,
        cache: LayerKV,
        step: StepInputs,
    ) -> Tensor:
        """Splits q|k|v [T, ...], norms and rotates q and k, and writes k and v to the cache.

        Returns:
            Queries [T, heads, head_dim].
        """

    def attention(self, query: Tensor, cache: LayerKV, step: StepInputs) -> Tensor:
        """Causal attention of each sequence over its cache: [T, heads * head_dim]."""

    def gated(self, gate_up: Tensor, consumer: DeviceLinear) -> Activation:
        """silu(gate) * up of [T, 2 * inner], prepared for the consumer."""

    def prefetch(self, linears: tuple[DeviceLinear, ...], after: Tensor) -> None:
        """Hints that these weights are needed soon after `after` is computed."""

    def join_prefetch(self) -> None:
        """Ends what `prefetch` began on another stream."""

    def memory_for_cache(self) -> int:
        """Bytes that the key/value cache may take by default."""
