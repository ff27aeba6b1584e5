"""From the manifest to weights on a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from qwen3_ascend.checkpoint.architecture import (
    ExpertsSpec,
    LayerSpec,
    LinearSpec,
    TensorSpec,
    model_spec,
)
from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.checkpoint.linear import Linear
from qwen3_ascend.runtime.backends.base import Backend, Cache, DeviceLinear, Mixture, Progress
from qwen3_ascend.runtime.model.qwen3 import DecoderLayer, Mlp, Qwen3


class WeightSource(Protocol):
    """Whatever holds a model's weights by name: a CheckpointReader, or random weights in memory."""

    @property
    def config(self) -> Qwen3Config:
        """The configuration of the model."""

    def tensor(self, name: str) -> Tensor:
        """An unquantized tensor."""

    def linear(self, name: str) -> Linear:
        """A stored linear."""


def load_model(
    source: WeightSource,
    backend: Backend[Cache],
    progress: Progress = lambda what, done, total: None,
) -> Qwen3[Cache]:
    """Puts every weight on the backend's device, in the order in which they lie in the files.

    Raises:
        CheckpointError: if a tensor of the model is missing, or the backend has no kernel for a
            scheme.
    """
    config = source.config
    spec = model_spec(config)
    embedding = backend.upload(source.tensor(spec.embedding.name))
    layers = []
    for layer in spec.layers:
        layers.append(load_layer(source, backend, layer))
        progress("loading layers", len(layers), len(spec.layers))
    final_norm = backend.upload(source.tensor(spec.final_norm.name))
    lm_head = (
        backend.linear(source.linear(spec.lm_head.name))
        if spec.lm_head
        else backend.dense(embedding)
    )
    backend.finish_loading()
    return Qwen3(config, backend, embedding, tuple(layers), final_norm, lm_head)


def load_layer(source: WeightSource, backend: Backend[Cache], spec: LayerSpec) -> DecoderLayer:
    """Puts the weights of one layer on the backend's device."""

    def tensor(spec: TensorSpec) -> Tensor:
        return backend.upload(source.tensor(spec.name))

    def linear(spec: LinearSpec) -> DeviceLinear:
        return backend.linear(source.linear(spec.name))

    def mixture(spec: ExpertsSpec) -> Mixture:
        linears = (backend.experts(source.linear(part.name)) for part in (spec.gate_up, spec.down))
        return Mixture.of(source.config.experts, backend.dense(tensor(spec.router)), *linears)

    return make_layer(spec, linear, tensor, mixture)


def make_layer(
    spec: LayerSpec,
    linear: Callable[[LinearSpec], DeviceLinear],
    norm: Callable[[TensorSpec], Tensor],
    mixture: Callable[[ExpertsSpec], Mixture] | None = None,
) -> DecoderLayer:
    """A layer, of whatever puts its linears, its norms and its experts on the device; the last is
    not needed for a dense model."""
    if isinstance(spec.mlp, ExpertsSpec):
        assert mixture is not None, "nothing puts experts on the device"
        mlp: Mlp | Mixture = mixture(spec.mlp)
    else:
        mlp = Mlp(gate_up=linear(spec.mlp.gate_up), down=linear(spec.mlp.down))
    return DecoderLayer(
        input_norm=norm(spec.input_norm),
        qkv=linear(spec.qkv),
        query_norm=norm(spec.query_norm),
        key_norm=norm(spec.key_norm),
        output=linear(spec.output),
        post_attention_norm=norm(spec.post_attention_norm),
        mlp=mlp,
    )
