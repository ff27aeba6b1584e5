"""The layers of a source as floats on a backend, one at a time: the model before quantization.

Calibration and evaluation read it through a LayerStream. What a source holds as codes is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qwen3_ascend.checkpoint.architecture import ExpertsSpec, LinearSpec, TensorSpec, model_spec
from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.checkpoint.linear import BIAS
from qwen3_ascend.convert.encodings import check_floats, read_weights
from qwen3_ascend.convert.exchange import WEIGHT
from qwen3_ascend.convert.source import Source
from qwen3_ascend.convert.source.names import EMBEDDING, HEAD
from qwen3_ascend.convert.source.tied_head import compare_head
from qwen3_ascend.runtime.backends.base import Backend, DeviceExperts, DeviceLinear, Mixture
from qwen3_ascend.runtime.model.loader import make_layer
from qwen3_ascend.runtime.model.qwen3 import DecoderLayer

Changed = Callable[[str, Tensor], Tensor]
"""(name of a source tensor, its float32 value) -> the float32 value that takes its place. Weights
of linears are named "….q_proj.weight", their biases "….q_proj.bias"; the output projection of a
tied model is asked for as "lm_head.weight", with the embedding as its value. The value may alias
the source's file and is not to be written to."""


class FloatModel:
    """A source's model in the compute type of a backend: float32 on a CPU, bfloat16 on an NPU.

    Every method reads its weights anew, so no more is in memory than the caller keeps.

    Attributes:
        config: of the model; not tied if the source holds a head that differs from its embedding.
        reads: every tensor that is read, in the order of the model; for Source.expect.
    """

    def __init__(
        self, source: Source, backend: Backend[Any], change: Changed | None = None
    ) -> None:
        """Checks every tensor that will be read, from headers.

        Args:
            source: is read tensor by tensor, and stays open as long as this is used.
            backend: where the weights go.
            change: makes equivalent weights; by default the source's own.

        Raises:
            SourceError: if a tensor is missing, or its type or shape is not what is said.
        """
        self._source, self._backend, self._change = source, backend, change
        self.config = settled_config(source)
        self._spec = model_spec(self.config)
        self.reads = tuple(self._names())

    def embedding(self) -> Tensor:
        """The embedding table [vocab, hidden] on the device."""
        return self._plain(self._spec.embedding)

    def layer(self, number: int) -> DecoderLayer:
        """A decoder layer on the device, counted from 0."""
        made = make_layer(self._spec.layers[number], self._linear, self._plain, self._mixture)
        self._source.drop_pages()
        return made

    def final_norm(self) -> Tensor:
        """The weight [hidden] of the norm before the output projection, on the device."""
        return self._plain(self._spec.final_norm)

    def head(self) -> DeviceLinear:
        """The output projection on the device; a tied one is made of the embedding."""
        if self._spec.lm_head is not None:
            return self._linear(self._spec.lm_head)
        weight = self._source.read(EMBEDDING).float()
        return self._backend.dense(self._backend.upload(self._changed(HEAD, weight)))

    def _plain(self, spec: TensorSpec) -> Tensor:
        return self._backend.upload(self._floats(spec.name))

    def _linear(self, spec: LinearSpec) -> DeviceLinear:
        upload = self._backend.upload
        bias = None
        if spec.bias:
            bias = upload(torch.cat([self._floats(f"{part}.{BIAS}") for part in spec.sources]))
        return self._backend.dense(upload(self._stacked(spec, spec.sources)), bias)

    def _mixture(self, spec: ExpertsSpec) -> Mixture:
        router = self._backend.dense(self._plain(spec.router))
        linears = self._experts(spec.gate_up), self._experts(spec.down)
        return Mixture.of(self.config.experts, router, *linears)

    def _experts(self, spec: LinearSpec) -> DeviceExperts:
        upload = self._backend.upload
        return self._backend.dense_experts([upload(self._stacked(spec, s)) for s in spec.matrices])

    def _stacked(self, spec: LinearSpec, sources: Sequence[str]) -> Tensor:
        """The float32 weight [N, K] of linears that are fused."""
        weight = torch.empty(spec.matrix)
        for rows, part in zip(weight.split(spec.parts), sources, strict=True):
            rows.copy_(self._weight(spec, part, rows.shape[0]))
        return weight

    def _floats(self, name: str) -> Tensor:
        return self._changed(name, self._source.read(name).float())

    def _weight(self, spec: LinearSpec, part: str, outputs: int) -> Tensor:
        encoding = self._source.quantization.encoding(part)
        names = self._weight_names(spec, part, outputs)
        tensors = {name: self._source.read(name) for name in names}
        return self._changed(f"{part}.{WEIGHT}", read_weights(encoding, [part], tensors).floats())

    def _changed(self, name: str, tensor: Tensor) -> Tensor:
        return tensor if self._change is None else self._change(name, tensor)

    def _names(self) -> Iterator[str]:
        """Every tensor that is read, in the order of the model."""
        slots = self._source.slots
        for spec in self._spec:
            if isinstance(spec, TensorSpec):
                check_floats(spec.name, spec.shape, slots)
                yield spec.name
                continue
            for sources in spec.matrices:
                for part, outputs in zip(sources, spec.parts, strict=True):
                    yield from self._weight_names(spec, part, outputs)
                    if spec.bias:
                        check_floats(f"{part}.{BIAS}", (outputs,), slots)
                        yield f"{part}.{BIAS}"

    def _weight_names(self, spec: LinearSpec, part: str, outputs: int) -> list[str]:
        encoding, slots = self._source.quantization.encoding(part), self._source.slots
        return [f"{part}.{end}" for end in encoding.suffixes(part, (outputs, spec.inputs), slots)]


def settled_config(source: Source) -> Qwen3Config:
    """The configuration of a source's model: as transformers does, a head that config.json ties to
    the embedding is kept if there is one and it differs."""
    config = source.config
    if config.tie_word_embeddings and compare_head(source) == "different":
        return replace(config, tie_word_embeddings=False)
    return config
