"""The Qwen3 forward. Every operation is the backend's; every input is an argument."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.runtime.backends.base import Backend, DeviceLinear, Rotary
from qwen3_ascend.runtime.backends.cache import LayerKV, PagedKVCache
from qwen3_ascend.runtime.backends.step import StepInputs


@dataclass(frozen=True)
class DecoderLayer:
    """Weights of one layer on the device."""

    input_norm: Tensor
    qkv: DeviceLinear
    query_norm: Tensor
    key_norm: Tensor
    output: DeviceLinear
    post_attention_norm: Tensor
    gate_up: DeviceLinear
    down: DeviceLinear


@dataclass(frozen=True)
class Qwen3:
    """A dense Qwen3 on a backend."""

    config: Qwen3Config
    backend: Backend
    embedding: Tensor
    layers: tuple[DecoderLayer, ...]
    final_norm: Tensor
    lm_head: DeviceLinear

    def forward(self, step: StepInputs, cache: PagedKVCache) -> Tensor:
        """Writes the step's keys and values to the cache; logits float32 [R, vocab]."""
        backend, epsilon = self.backend, self.config.rms_norm_eps
        rotary = backend.rotary(self.config, step)
        hidden, delta = backend.embed(step.tokens, self.embedding), None
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            hidden, delta = self._layer(layer, hidden, delta, rotary, layer_cache, step)
        assert delta is not None
        if step.logit_rows is not None:
            hidden, delta = hidden[step.logit_rows], delta[step.logit_rows]
        x, _ = backend.add_norm(hidden, delta, self.final_norm, epsilon, self.lm_head)
        return self.lm_head(x).float()

    def _layer(
        self,
        layer: DecoderLayer,
        hidden: Tensor,
        delta: Tensor | None,
        rotary: Rotary,
        cache: LayerKV,
        step: StepInputs,
    ) -> tuple[Tensor, Tensor]:
        """(residual stream, what the MLP adds to it); the sum is made by the next norm."""
        backend, epsilon = self.backend, self.config.rms_norm_eps
        x, hidden = backend.add_norm(hidden, delta, layer.input_norm, epsilon, layer.qkv)
        query = backend.norm_rope_write(
            layer.qkv(x), layer.query_norm, layer.key_norm, epsilon, rotary, cache, step
        )
        attended = backend.attention(query, cache, step)
        backend.prefetch((layer.gate_up, layer.down), attended)
        delta = layer.output(attended)
        x, hidden = backend.add_norm(
            hidden, delta, layer.post_attention_norm, epsilon, layer.gate_up
        )
        delta = layer.down(backend.gated(layer.gate_up(x), layer.down))
        backend.join_prefetch()
        return hidden, delta
