"""The configuration of a Qwen3, read from Hugging Face's config.json and checked once."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qwen3_ascend.errors import ConfigError
from qwen3_ascend.files.json_file import Count, Positive, Size, read_json_object

ROPE_TYPES = ("default", "yarn")

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
class Qwen3Config:
    """The numbers a Qwen3 forward needs, checked once. All sizes are counts of elements."""

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

    @property
    def context_length(self) -> int:
        """Longest sequence in tokens; yarn extends the trained length by its factor."""
        if self.rope.type == "default":
            return self.max_position
        extended = math.floor(self.rope.original_max_position * self.rope.factor)
        return max(self.max_position, extended)

    @classmethod
    def from_hf(cls, data: Mapping[str, Any], where: str = "config.json") -> Qwen3Config:
        """Reads a Hugging Face configuration.

        Raises:
            ConfigError: naming the first thing that is not a Qwen3 this project supports.
        """
        return _Reader(data, where).config()

    @classmethod
    def from_file(cls, path: Path) -> Qwen3Config:
        """Reads config.json; ConfigError if it is missing or not one."""
        return cls.from_hf(read_json_object(path), str(path))


class _Reader:
    """Turns a foreign config.json into ours; all guessing about its dialects stays in here."""

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.data, self.where = data, where

    def config(self) -> Qwen3Config:
        self._refuse_the_unsupported()
        heads = self._count("num_attention_heads")
        config = Qwen3Config(
            hidden_size=self._count("hidden_size"),
            intermediate_size=self._count("intermediate_size"),
            num_layers=self._count("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=self._count("num_key_value_heads", heads),
            head_dim=self._count("head_dim", 128),
            vocab_size=self._count("vocab_size"),
            max_position=self._count("max_position_embeddings", 32768),
            rms_norm_eps=self._number("rms_norm_eps", self.data.get("rms_norm_eps", 1e-6)),
            tie_word_embeddings=self._flag("tie_word_embeddings"),
            attention_bias=self._flag("attention_bias"),
            rope=self._rope(),
        )
        self._check_heads(config)
        self._check_context(config)
        return config

    def _fail(self, message: str) -> ConfigError:
        return ConfigError(f"{self.where}: {message}")

    def _refuse_the_unsupported(self) -> None:
        kind = self.data.get("model_type")
        if kind != "qwen3":
            raise self._fail(f"model_type is {kind!r}; only 'qwen3' (dense Qwen3) is supported")
        quantized = self.data.get("quantization_config")
        if quantized:
            method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
            raise self._fail(
                f"the weights are already quantized ({method}); use the original bf16 model"
            )
        activation = self.data.get("hidden_act", "silu")
        if activation != "silu":
            raise self._fail(f"hidden_act is {activation!r}; Qwen3 uses 'silu'")
        kinds = self.data.get("layer_types") or []
        if not isinstance(kinds, list):
            raise self._fail(f"layer_types must be a list, not {kinds!r}")
        if "sliding_attention" in kinds or self.data.get("use_sliding_window"):
            raise self._fail("sliding window attention is in use; only full attention is supported")

    def _count(self, key: str, default: int | None = None) -> int:
        value = self.data.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 63:
            raise self._fail(f"{key} must be a positive integer, not {value!r}")
        return value

    def _number(self, key: str, value: Any) -> float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value <= sys.float_info.max:
            raise self._fail(f"{key} must be a positive number, not {value!r}")
        return float(value)

    def _flag(self, key: str) -> bool:
        value = self.data.get(key, False)
        if not isinstance(value, bool):
            raise self._fail(f"{key} must be true or false, not {value!r}")
        return value

    def _check_heads(self, config: Qwen3Config) -> None:
        if config.num_heads % config.num_kv_heads:
            raise self._fail(
                f"num_attention_heads {config.num_heads} is not a multiple of "
                f"num_key_value_heads {config.num_kv_heads}"
            )
        if config.head_dim % 2:
            raise self._fail(f"head_dim {config.head_dim} is odd: rotary embedding needs pairs")

    def _check_context(self, config: Qwen3Config) -> None:
        rope = config.rope
        context = max(config.max_position, rope.original_max_position * rope.factor)
        if context > MAX_CONTEXT:
            raise self._fail(f"a context of {context:.0f} tokens is beyond {MAX_CONTEXT}")

    def _rope_section(self) -> dict[str, Any]:
        """transformers 5 writes rope_parameters; before, rope_theta stood beside rope_scaling."""
        section = self.data.get("rope_parameters") or self.data.get("rope_scaling") or {}
        if not isinstance(section, dict):
            raise self._fail(f"rope parameters must be an object, not {section!r}")
        return {"rope_theta": self.data.get("rope_theta", 10000.0), **section}

    def _rope(self) -> RopeConfig:
        section = self._rope_section()
        kind = section.get("rope_type", section.get("type", "default"))
        theta = self._number("rope_theta", section["rope_theta"])
        if theta <= 1:
            raise self._fail(f"rope_theta must be above 1, not {theta!r}")
        if kind not in ROPE_TYPES:
            known = ", ".join(ROPE_TYPES)
            raise self._fail(f"rope type {kind!r} is not supported; known types: {known}")
        if section.get("partial_rotary_factor", 1.0) != 1.0:
            raise self._fail("partial_rotary_factor other than 1 is not supported")
        return RopeConfig("default", theta) if kind == "default" else self._yarn(section, theta)

    def _yarn(self, section: dict[str, Any], theta: float) -> RopeConfig:
        def number(key: str, default: float) -> float:
            value = section.get(key)
            return self._number(key, default if value is None else value)

        trained = self._count("max_position_embeddings", 32768)
        original = number("original_max_position_embeddings", trained)
        factor = number("factor", trained / original)
        scales = [number(key, 1.0) for key in ("mscale", "mscale_all_dim") if section.get(key)]
        return RopeConfig(
            type="yarn",
            theta=theta,
            factor=factor,
            original_max_position=int(original),
            attention_factor=number("attention_factor", _yarn_attention(factor, scales)),
            beta_fast=number("beta_fast", 32.0),
            beta_slow=number("beta_slow", 1.0),
            truncate=bool(section.get("truncate", True)),
        )


def _yarn_attention(factor: float, scales: Sequence[float]) -> float:
    """The scale of cosine and sine when the configuration does not state one; mscale and
    mscale_all_dim count only together."""

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    return scale(scales[0]) / scale(scales[1]) if len(scales) == 2 else scale(1.0)
