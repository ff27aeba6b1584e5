"""A model one layer at a time over many texts: one layer in memory, whatever the size of the model.

Calibration and evaluation read models that way. The hidden states of all texts go through a layer
before the next layer is loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Generic

import torch
from torch import Tensor

from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.runtime.backends.base import Backend, Cache, DeviceLinear, StepBounds
from qwen3_ascend.runtime.backends.cache import SCRATCH_BLOCK
from qwen3_ascend.runtime.backends.step import StepInputs
from qwen3_ascend.runtime.model.qwen3 import DecoderLayer, decoder_layer

LOGIT_ROWS = 256
"""Rows of logits at a time: 152 MB of float32 for Qwen3's vocabulary."""


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

    def embed(self, table: Tensor) -> list[Tensor]:
        """The hidden states [T, hidden] of each step before the first layer.

        Args:
            table: the uploaded embedding [vocab, hidden].
        """
        return [
            self.backend.embed(self.backend.open_step(step).inputs.tokens, table)
            for step in self.steps
        ]

    def through(self, layer: DecoderLayer, hidden: Sequence[Tensor]) -> Iterator[Tensor]:
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


def one_layer(config: Qwen3Config) -> Qwen3Config:
    """The configuration of the backend of a LayerStream: its cache is one layer's."""
    return dataclasses.replace(config, num_layers=1)


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
