"""From the manifest to weights on a device."""

from __future__ import annotations

from collections.abc import Callable

from qwen3_ascend.checkpoint.files import CheckpointReader
from qwen3_ascend.checkpoint.layout import ND
from qwen3_ascend.checkpoint.model import (
    EMBEDDING,
    FINAL_NORM,
    LM_HEAD,
    layer_linears,
    layer_norms,
)
from qwen3_ascend.checkpoint.schemes import BF16
from qwen3_ascend.runtime.backends.base import Backend, DeviceLinear
from qwen3_ascend.runtime.model import DecoderLayer, Qwen3


def load_model(
    reader: CheckpointReader,
    backend: Backend,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Qwen3:
    """Puts every weight on the backend's device, layer by layer.

    Raises:
        CheckpointError: if a tensor of the model is missing, or the backend has no kernel for a
            scheme.
    """
    config = reader.manifest.model
    layers = []
    for layer in range(config.num_layers):
        layers.append(_load_layer(reader, backend, layer))
        progress("loading layers", layer + 1, config.num_layers)
    table = reader.tensor(f"{EMBEDDING}.weight")
    embedding = backend.upload(table)
    if config.tie_word_embeddings:
        shape = (config.vocab_size, config.hidden_size)
        lm_head = backend.linear(BF16(shape, ND, table, None))
    else:
        lm_head = backend.linear(reader.linear(LM_HEAD))
    final_norm = backend.upload(reader.tensor(f"{FINAL_NORM}.weight"))
    return Qwen3(config, backend, embedding, tuple(layers), final_norm, lm_head)


def _load_layer(reader: CheckpointReader, backend: Backend, layer: int) -> DecoderLayer:
    config = reader.manifest.model
    linears: list[DeviceLinear] = [
        backend.linear(reader.linear(spec.name)) for spec in layer_linears(config, layer)
    ]
    norms = [backend.upload(reader.tensor(name)) for name in layer_norms(config, layer)]
    qkv, output, gate_up, down = linears
    input_norm, query_norm, key_norm, post_attention_norm = norms
    return DecoderLayer(
        input_norm, qkv, query_norm, key_norm, output, post_attention_norm, gate_up, down
    )
