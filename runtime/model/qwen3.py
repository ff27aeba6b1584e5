"""The Qwen3 forward. Every operation is the backend's; every input is an argument."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic

from torch import Tensor

from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.runtime.backends.base import Backend, Cache, DeviceLinear, Mixture, as_float
from qwen3_ascend.runtime.backends.step import DeviceStep


@dataclass(frozen=True)
class Mlp:
    """Weights of a layer's gated MLP on the device."""

    gate_up: DeviceLinear
    down: DeviceLinear


@dataclass(frozen=True)
class DecoderLayer:
    """Weights of one layer on the device; the fields are those of its LayerSpec."""

    input_norm: Tensor
    query_norm: Tensor
    key_norm: Tensor
    post_attention_norm: Tensor
    qkv: DeviceLinear
    output: DeviceLinear
    mlp: Mlp | Mixture


@dataclass(frozen=True)
class Qwen3(Generic[Cache]):
    """A Qwen3 on a backend, dense or with mixtures of experts."""

    config: Qwen3Config
    backend: Backend[Cache]
    embedding: Tensor
    layers: tuple[DecoderLayer, ...]
    final_norm: Tensor
    lm_head: DeviceLinear

    def forward(self, step: DeviceStep, caches: tuple[Cache, ...]) -> Tensor:
        """Writes the step's keys and values to the caches; logits float32 [R, vocab]."""
        backend, epsilon = self.backend, self.config.rms_norm_eps
        hidden, delta = backend.embed(step.inputs.tokens, self.embedding), None
        for layer, cache in zip(self.layers, caches, strict=True):
            hidden, delta = decoder_layer(backend, layer, epsilon, hidden, delta, step, cache)
        assert delta is not None
        if step.inputs.logit_rows is not None:
            hidden, delta = hidden[step.inputs.logit_rows], delta[step.inputs.logit_rows]
        x, _ = backend.add_norm(hidden, delta, self.final_norm, epsilon, self.lm_head)
        return backend.logits(self.lm_head, x)


def decoder_layer(
    backend: Backend[Cache],
    layer: DecoderLayer,
    epsilon: float,
    hidden: Tensor,
    delta: Tensor | None,
    step: DeviceStep,
    cache: Cache,
) -> tuple[Tensor, Tensor]:
    """One decoder layer: attention over the cache, then the MLP, or the mixture of experts.

    The residual stream comes in two parts, because the sum is made by the next norm.

    Args:
        backend: computes it.
        layer: its weights.
        epsilon: of the RMS norms.
        hidden: [T, hidden], the residual stream.
        delta: [T, hidden], what the layer before adds to it; None before the first layer.
        step: which tokens, and where their keys and values go.
        cache: of this layer; the step's keys and values are written to it.

    Returns:
        (hidden, delta), each [T, hidden], for the next layer.
    """
    x, hidden = backend.add_norm(hidden, delta, layer.input_norm, epsilon, layer.qkv)
    query = backend.norm_rope_write(
        layer.qkv(x), layer.query_norm, layer.key_norm, epsilon, step, cache
    )
    attended = backend.attention(query, step, cache, layer.output)
    mlp, norm = layer.mlp, layer.post_attention_norm
    if isinstance(mlp, Mixture):  # which weights will be needed is not known yet
        x, hidden = backend.add_norm(hidden, layer.output(attended), norm, epsilon, mlp.router)
        return hidden, backend.mixture(as_float(x), mlp)
    backend.prefetch((mlp.gate_up, mlp.down), attended)
    x, hidden = backend.add_norm(hidden, layer.output(attended), norm, epsilon, mlp.gate_up)
    delta = mlp.down(backend.gated(mlp.gate_up(x), mlp.down))
    backend.join_prefetch()
    return hidden, delta
