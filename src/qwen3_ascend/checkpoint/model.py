"""What a Qwen3 is: its configuration, its tensors, and which of them form one linear."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from qwen3_ascend.checkpoint.errors import ConfigError
from qwen3_ascend.checkpoint.layout import Cut

EMBEDDING = "model.embed_tokens"
FINAL_NORM = "model.norm"
LM_HEAD = "lm_head"

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
    theta: float
    factor: float = 1.0
    original_max_position: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class Qwen3Config:
    """The numbers a Qwen3 forward needs, checked once. All sizes are counts of elements."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    rms_norm_eps: float
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

    def to_json(self) -> dict[str, Any]:
        """The manifest's form; `from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Qwen3Config:
        """Reads the manifest's form; ConfigError if it is not one."""
        try:
            return cls(**{**data, "rope": RopeConfig(**data["rope"])})
        except (KeyError, TypeError) as error:
            raise ConfigError(f"the manifest's model section is not readable: {error}") from error


@dataclass(frozen=True)
class LinearSpec:
    """One linear as the runtime computes it, and the Hugging Face linears it is fused of.

    Attributes:
        name: such as "model.layers.0.self_attn.qkv_proj".
        sources: such as ("model.layers.0.self_attn.q_proj", ...), concatenated along outputs.
        parts: outputs of each source; their sum is N.
        inputs: K.
        cut: how tensor parallelism divides it.
        bias: whether every source has a bias.
    """

    name: str
    sources: tuple[str, ...]
    parts: tuple[int, ...]
    inputs: int
    cut: Cut
    bias: bool

    @property
    def outputs(self) -> int:
        """N, the outputs of the fused linear."""
        return sum(self.parts)


def layer_linears(config: Qwen3Config, layer: int) -> tuple[LinearSpec, ...]:
    """The four linears of a decoder layer, in the order in which a forward meets them."""
    attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
    query, key_value = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, inner, bias = config.hidden_size, config.intermediate_size, config.attention_bias
    qkv = tuple(f"{attention}.{name}" for name in ("q_proj", "k_proj", "v_proj"))
    gate_up = tuple(f"{mlp}.{name}" for name in ("gate_proj", "up_proj"))
    output, down = f"{attention}.o_proj", f"{mlp}.down_proj"
    return (
        LinearSpec(
            f"{attention}.qkv_proj", qkv, (query, key_value, key_value), hidden, "column", bias
        ),
        LinearSpec(output, (output,), (hidden,), query, "row", bias),
        LinearSpec(f"{mlp}.gate_up_proj", gate_up, (inner, inner), hidden, "column", False),
        LinearSpec(down, (down,), (hidden,), inner, "row", False),
    )


def lm_head_linear(config: Qwen3Config) -> LinearSpec:
    """The output projection; with tied embeddings it has no tensor of its own."""
    return LinearSpec(
        LM_HEAD, (LM_HEAD,), (config.vocab_size,), config.hidden_size, "column", False
    )


def layer_norms(config: Qwen3Config, layer: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the norm weights of a decoder layer."""
    prefix = f"model.layers.{layer}"
    return {
        f"{prefix}.input_layernorm.weight": (config.hidden_size,),
        f"{prefix}.self_attn.q_norm.weight": (config.head_dim,),
        f"{prefix}.self_attn.k_norm.weight": (config.head_dim,),
        f"{prefix}.post_attention_layernorm.weight": (config.hidden_size,),
    }


def walk(config: Qwen3Config) -> Iterator[LinearSpec | tuple[str, tuple[int, ...]]]:
    """Every linear and every plain tensor (name, shape) of the model, in forward order.

    With tied embeddings the output projection is not listed: the embedding serves twice.
    """
    yield f"{EMBEDDING}.weight", (config.vocab_size, config.hidden_size)
    for layer in range(config.num_layers):
        yield from layer_norms(config, layer).items()
        yield from layer_linears(config, layer)
    yield f"{FINAL_NORM}.weight", (config.hidden_size,)
    if not config.tie_word_embeddings:
        yield lm_head_linear(config)


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file; ConfigError naming the file if there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is missing: this is not a Hugging Face model folder") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a JSON object, not {type(data).__name__}")
    return data


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
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
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
