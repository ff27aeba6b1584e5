"""How far a quantized model is from the one that it was made of, on the same windows of a text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.runtime.backends.base import Backend, DeviceLinear
from qwen3_ascend.runtime.model.qwen3 import DecoderLayer
from qwen3_ascend.runtime.streaming import LayerStream

RESAMPLES = 2000
LEAST_WINDOWS = 8
"""Below that, resampling windows says nothing of their spread."""


class Layers(Protocol):
    """A model that is read a layer at a time."""

    config: Qwen3Config
    backend: Backend[Any]
    """Computes it; made for `one_layer` of the configuration."""

    def embedding(self) -> Tensor:
        """The embedding table [vocab, hidden]."""

    def layer(self, number: int) -> DecoderLayer:
        """A decoder layer, counted from 0."""

    def final_norm(self) -> Tensor:
        """The weight [hidden] of the norm before the output projection."""

    def head(self) -> DeviceLinear:
        """The output projection."""


@dataclass(frozen=True)
class Interval:
    """A mean over windows, and where it lies with 95 %: a bootstrap of whole windows, because the
    tokens of one depend on each other."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Score:
    """A candidate against its reference.

    Attributes:
        divergence: KL(reference || candidate), nats a token.
        perplexity_change: the candidate's perplexity over the reference's, less one.
        reference_perplexity: on the same tokens.
        tokens: scored, each after the first of its window.
    """

    divergence: Interval
    perplexity_change: Interval
    reference_perplexity: float
    tokens: int


class Scorer:
    """Holds candidates against one reference, whose states it keeps."""

    def __init__(self, reference: Layers, windows: Sequence[Sequence[int]]) -> None:
        """Args:
        reference: the model before quantization, in float32.
        windows: of the text, all of one length.
        """
        self.windows = windows
        self._log_probabilities = list(self._rows(reference))

    def score(self, candidate: Layers) -> Score:
        """Runs the candidate over the windows.

        Raises:
            ValueError: if its logits are not finite.
        """
        divergence, loss, base = [], [], []
        wanted = torch.tensor([window[1:] for window in self.windows])
        rows = zip(self._log_probabilities, self._rows(candidate), strict=True)
        for (expected, found), tokens in zip(rows, wanted, strict=True):
            divergence.append((expected.exp() * (expected - found)).sum(-1).mean())
            base.append(-expected.gather(1, tokens[:, None]).mean())
            loss.append(-found.gather(1, tokens[:, None]).mean())
        kl, reference = torch.stack(divergence).double(), torch.stack(base).double()
        change = torch.stack(loss).double() - reference
        if not bool(kl.isfinite().all()):
            raise ValueError("its logits are not finite")
        return Score(
            interval(kl),
            Interval(*(math.expm1(value) for value in vars(interval(change)).values())),
            math.exp(reference.mean()),
            wanted.numel(),
        )

    def _rows(self, model: Layers) -> Iterator[Tensor]:
        """Log-probabilities float32 [tokens - 1, vocab] of each window."""
        with torch.inference_mode():
            stream = LayerStream(model.backend, model.config.rms_norm_eps, self.windows)
            hidden = stream.embed(model.embedding())
            for number in range(model.config.num_layers):
                hidden = list(stream.through(model.layer(number), hidden))
            norm, head = model.final_norm(), model.head()
            states = torch.cat(hidden).split([len(window) for window in self.windows])
            for window in states:
                logits = torch.cat(list(stream.logits(window[:-1], norm, head)))
                yield logits.log_softmax(-1)


def interval(values: Tensor, seed: int = 0) -> Interval:
    """The mean of float64 values [W], a window's each, and its interval; the interval is not a
    number where there are too few windows."""
    mean = float(values.mean())
    if len(values) < LEAST_WINDOWS:
        return Interval(mean, math.nan, math.nan)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = values[chosen].mean(1).quantile(ends).tolist()
    return Interval(mean, low, high)
