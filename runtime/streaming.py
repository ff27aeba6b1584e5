"""A model one layer at a time over many texts: one layer in memory, whatever the size of the model.

Calibration and evaluation read models that way. The hidden states of all texts go through a layer
before the next layer is loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, Protocol

import torch
from torch import Tensor

from qwen3_ascend.checkpoint.architecture import model_spec
from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.runtime.backends.base import Backend, Cache, DeviceLinear, StepBounds
from qwen3_ascend.runtime.backends.cache import SCRATCH_BLOCK
from qwen3_ascend.runtime.backends.step import StepInputs
from qwen3_ascend.runtime.model.loader import WeightSource, load_layer
from qwen3_ascend.runtime.model.qwen3 import DecoderLayer, decoder_layer

LOGIT_ROWS = 256
"""Rows of logits at a time: 152 MB of float32 for Qwen3's vocabulary."""


class LayeredModel(Protocol):
    """A model whose weights come onto a device when they are asked for, and go with the caller's
    reference to them."""

    @property
    def config(self) -> Qwen3Config:
        """The configuration of the model."""

    def embedding(self) -> Tensor:
        """The embedding table [vocab, hidden]."""

    def layer(self, number: int) -> DecoderLayer:
        """A decoder layer, counted from 0."""

    def final_norm(self) -> Tensor:
        """The weight [hidden] of the norm before the output projection."""

    def head(self) -> DeviceLinear:
        """The output projection; a tied one is made of the embedding."""


class StoredModel:
    """The model of a converted checkpoint, as a LayeredModel."""

    def __init__(self, weights: WeightSource, backend: Backend[Any]) -> None:
        self.config, self._weights, self._backend = weights.config, weights, backend
        self._spec = model_spec(self.config)

    def embedding(self) -> Tensor:
        """See LayeredModel."""
        return self._backend.upload(self._weights.tensor(self._spec.embedding.name))

    def layer(self, number: int) -> DecoderLayer:
        """See LayeredModel."""
        return load_layer(self._weights, self._backend, self._spec.layers[number])

    def final_norm(self) -> Tensor:
        """See LayeredModel."""
        return self._backend.upload(self._weights.tensor(self._spec.final_norm.name))

    def head(self) -> DeviceLinear:
        """See LayeredModel."""
        if self._spec.lm_head is None:
            return self._backend.dense(self.embedding())
        return self._backend.linear(self._weights.linear(self._spec.lm_head.name))


class LayerStream(Generic[Cache]):
    """Texts on their way through the layers of a model, a step of some texts after the other."""

    def __init__(
        self,
        backend: Backend[Cache],
        epsilon: float,
        texts: Sequence[Sequence[int]],
        step_tokens: int = 2048,
        block_size: int = 128,
    ) -> None:
        """Args:
        backend: computes; it was made for `one_layer` of the model's configuration.
        epsilon: of the model's RMS norms.
        texts: token ids, each read from its beginning and not empty.
        step_tokens: of a step, unless one text alone has more.
        block_size: of the cache.
        """
        self.backend, self.epsilon = backend, epsilon
        self.steps = [
            _whole_texts(group, block_size) for group in _grouped(texts, max(1, step_tokens))
        ]
        blocks = max(int(step.block_table.max()) + 1 for step in self.steps)
        batch = max(len(step.context_lens) for step in self.steps)
        (self._cache,) = backend.allocate_cache(StepBounds(batch, block_size, blocks))

    def read(
        self, model: LayeredModel, progress: Callable[[], None] = lambda: None
    ) -> list[Tensor]:
        """The hidden states [T, hidden] of each step after the last layer of a model.

        Args:
            model: of the configuration that the backend was made for.
            progress: called after each layer.
        """
        hidden = self.embed(model.embedding())
        for number in range(model.config.num_layers):
            hidden = [*self.through(model.layer(number), hidden)]
            progress()
        return hidden

    def embed(self, table: Tensor) -> list[Tensor]:
        """The hidden states [T, hidden] of each step before the first layer.

        Args:
            table: the uploaded embedding [vocab, hidden].
        """
        return [
            self.backend.embed(self.backend.open_step(step).inputs.tokens, table)
            for step in self.steps
        ]

    def through(self, layer: DecoderLayer, hidden: Iterable[Tensor]) -> Iterator[Tensor]:
        """The hidden states [T, hidden] of each step after a layer, as they are asked for.

        Args:
            layer: its weights on the device.
            hidden: of each step before it.
        """
        for inputs, states in zip(self.steps, hidden, strict=True):
            step = self.backend.open_step(inputs)
            before, delta = decoder_layer(
                self.backend, layer, self.epsilon, states, None, step, self._cache
            )
            yield before + delta

    def logits(self, hidden: Tensor, final_norm: Tensor, lm_head: DeviceLinear) -> Iterator[Tensor]:
        """Logits, float32 [R, vocab], of hidden states [T, hidden] after the last layer: in order,
        a few hundred rows at a time."""
        for rows in hidden.split(LOGIT_ROWS):
            x, _ = self.backend.add_norm(rows, None, final_norm, self.epsilon, lm_head)
            yield lm_head(x).float()


def one_layer(config: Qwen3Config, longest: int | None = None) -> Qwen3Config:
    """The configuration of the backend of a LayerStream: its cache is one layer's.

    Args:
        config: of the model.
        longest: tokens of the longest text, so that no tables are made for more positions (yarn
            makes its own for all); None if that is not known.
    """
    positions = config.max_position if longest is None else min(longest, config.max_position)
    return dataclasses.replace(config, num_layers=1, max_position=positions)


def _grouped(texts: Sequence[Sequence[int]], most: int) -> Iterator[list[Sequence[int]]]:
    group: list[Sequence[int]] = []
    for text in texts:
        if group and sum(map(len, group)) + len(text) > most:
            yield group
            group = []
        group.append(text)
    if group:
        yield group


def _whole_texts(texts: Sequence[Sequence[int]], block_size: int) -> StepInputs:
    """The step that reads texts from their beginning to their end."""
    lengths = [len(text) for text in texts]
    width = -(-max(lengths) // block_size)
    table = torch.full((len(texts), width), SCRATCH_BLOCK, dtype=torch.int32)
    slots, starts, block = [], [0], SCRATCH_BLOCK + 1
    for row, length in enumerate(lengths):
        blocks = -(-length // block_size)
        table[row, :blocks] = torch.arange(block, block + blocks, dtype=torch.int32)
        first = block * block_size
        slots.append(torch.arange(first, first + length, dtype=torch.int32))
        starts.append(starts[-1] + length)
        block += blocks
    return StepInputs(
        tokens=torch.tensor([token for text in texts for token in text], dtype=torch.int32),
        positions=torch.cat([torch.arange(length, dtype=torch.int32) for length in lengths]),
        slots=torch.cat(slots),
        block_table=table,
        context_lens=tuple(lengths),
        query_starts=tuple(starts),
        logit_rows=None,
    )
