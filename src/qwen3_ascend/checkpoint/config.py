"""The configuration of a Qwen3: what a manifest states of its model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from qwen3_ascend.files.json_file import Count, Positive, Size

MAX_CONTEXT = (1 << 31) - 1
"""Positions and cache slots are int32 on the device."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding parameters; the yarn fields are unused for the type "default".

    `attention_factor` already has its default (0.1 ln(factor) + 1, arXiv 2309.00071 section 3.4)
    filled in and multiplies cosine and sine.
    """

    type: Literal["default", "yarn"]
    theta: Positive
    factor: Positive = 1.0
    original_max_position: Count = 0
    attention_factor: Positive = 1.0
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class ExpertsConfig:
    """The mixtures of experts that stand in the place of MLPs.

    Attributes:
        count: experts of a layer.
        per_token: experts that each token is given to, at most `count`.
        intermediate_size: of an expert.
        normalize: whether the weights of a token's experts are divided by their sum.
        dense_layers: numbers of the layers, in ascending order, that keep an MLP.
    """

    count: Size
    per_token: Size
    intermediate_size: Size
    normalize: bool
    dense_layers: tuple[Count, ...] = ()


@dataclass(frozen=True)
class Qwen3Config:
    """The numbers a Qwen3 forward needs, checked once. All sizes are counts of elements.

    `intermediate_size` is that of MLPs; `experts` is None for a dense model.
    """

    hidden_size: Size
    intermediate_size: Size
    num_layers: Size
    num_heads: Size
    num_kv_heads: Size
    head_dim: Size
    vocab_size: Size
    max_position: Size
    rms_norm_eps: Positive
    tie_word_embeddings: bool
    attention_bias: bool
    rope: RopeConfig
    experts: ExpertsConfig | None = None

    def experts_of(self, layer: int) -> ExpertsConfig | None:
        """The mixture of experts of decoder layer number `layer`; None if it has an MLP."""
        if self.experts is None or layer in self.experts.dense_layers:
            return None
        return self.experts

    @property
    def context_length(self) -> int:
        """Longest sequence in tokens; yarn extends the trained length by its factor."""
        if self.rope.type == "default":
            return self.max_position
        extended = math.floor(self.rope.original_max_position * self.rope.factor)
        return max(self.max_position, extended)
