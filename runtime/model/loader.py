"""From the manifest to weights on a device."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from qwen3_ascend.checkpoint.architecture import (
    EMBEDDING,
    FINAL_NORM,
    LM_HEAD,
    layer_linears,
    layer_norms,
)
from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.checkpoint.schemes import Linear
from qwen3_ascend.runtime.backends.base import Backend, DeviceLinear, Progress
from qwen3_ascend.runtime.model.qwen3 import DecoderLayer, Qwen3


class WeightSource(Protocol):
    """Whatever holds a model's weights by name: a CheckpointReader, or random weights in memory."""

    @property
    def config(self) -> Qwen3Config:
        """Of the model."""

    def tensor(self, name: str) -> Tensor:
        """An unquantized tensor."""

    def linear(self, name: str) -> Linear:
        """A stored linear."""


def load_model(
    source: WeightSource,
    backend: Backend,
    progress: Progress = lambda what, done, total: None,
) -> Qwen3:
    """Puts every weight on the backend's device, layer by layer.

    Raises:
        CheckpointError: if a tensor of the model is missing, or the backend has no kernel for a
            scheme.
    """
    config = source.config
    layers = []
    for layer in range(config.num_layers):
        layers.append(_load_layer(source, backend, layer))
        progress("loading layers", layer + 1, config.num_layers)
    embedding = backend.upload(source.tensor(f"{EMBEDDING}.weight"))
    tied = config.tie_word_embeddings
    lm_head = backend.tied_head(embedding) if tied else backend.linear(source.linear(LM_HEAD))
    final_norm = backend.upload(source.tensor(f"{FINAL_NORM}.weight"))
    return Qwen3(config, backend, embedding, tuple(layers), final_norm, lm_head)


def _load_layer(source: WeightSource, backend: Backend, layer: int) -> DecoderLayer:
    config = source.config
    linears: list[DeviceLinear] = [
        backend.linear(source.linear(spec.name)) for spec in layer_linears(config, layer)
    ]
    norms = [backend.upload(source.tensor(name)) for name in layer_norms(config, layer)]
    qkv, output, gate_up, down = linears
    input_norm, query_norm, key_norm, post_attention_norm = norms
    return DecoderLayer(
        input_norm, qkv, query_norm, key_norm, output, post_attention_norm, gate_up, down
    )
