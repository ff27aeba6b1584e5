"""What the weights of a model are to a transform: which linears read and write what.

Names are those of the source, without ".weight". A mixture of experts has the same parts, more than
one MLP, and a router that reads what they read.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen3_ascend.checkpoint.architecture import EMBEDDING, LM_HEAD
from qwen3_ascend.checkpoint.config import Qwen3Config


@dataclass(frozen=True)
class Mlp:
    """down(silu(gate(x)) * up(x))."""

    gate: str
    up: str
    down: str


@dataclass(frozen=True)
class LayerParts:
    """A decoder layer.

    Attributes:
        input_norm, post_attention_norm: of the residual stream.
        query, key, value, output: of the attention; query and key end in norms of their own, which
            nothing crosses.
        mlps: one, or the experts.
        router: that chooses experts; None if there is nothing to choose.
    """

    input_norm: str
    post_attention_norm: str
    query: str
    key: str
    value: str
    output: str
    mlps: tuple[Mlp, ...]
    router: str | None

    @property
    def attention_readers(self) -> tuple[str, ...]:
        """The linears that read the first norm."""
        return self.query, self.key, self.value

    @property
    def mlp_readers(self) -> tuple[str, ...]:
        """The linears that read the second norm."""
        router = () if self.router is None else (self.router,)
        return router + tuple(name for mlp in self.mlps for name in (mlp.gate, mlp.up))

    @property
    def writers(self) -> tuple[str, ...]:
        """The linears whose outputs are added to the residual stream."""
        return self.output, *(mlp.down for mlp in self.mlps)

    @property
    def names(self) -> tuple[str, ...]:
        """All of it, but for the norms of queries and keys."""
        norms = (self.input_norm, self.post_attention_norm)
        return norms + self.attention_readers + self.mlp_readers + self.writers


@dataclass(frozen=True)
class EndParts:
    """What is before the first layer and after the last one. A head that the embedding serves as
    has a name of its own here, since it becomes another weight."""

    embedding: str
    final_norm: str
    head: str

    @property
    def names(self) -> tuple[str, ...]:
        """All of it."""
        return self.embedding, self.final_norm, self.head


Unit = EndParts | LayerParts
"""Weights whose changes are found together."""


@dataclass(frozen=True)
class ModelParts:
    """A model.

    Attributes:
        ends, layers: its weights; layers in forward order.
        hidden_size: of the residual stream.
        num_heads, num_kv_heads, head_dim: of the attention.
    """

    ends: EndParts
    layers: tuple[LayerParts, ...]
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def units(self) -> tuple[Unit, ...]:
        """All of it."""
        return self.ends, *self.layers


def model_parts(config: Qwen3Config) -> ModelParts:
    """The parts of a Qwen3, by the names that transformers saves them under."""
    return ModelParts(
        ends=EndParts(EMBEDDING, "model.norm", LM_HEAD),
        layers=tuple(_layer(config, number) for number in range(config.num_layers)),
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )


def _layer(config: Qwen3Config, number: int) -> LayerParts:
    prefix, experts = f"model.layers.{number}", config.experts_of(number)
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    mlps = [f"{mlp}.experts.{expert}" for expert in range(experts.count)] if experts else [mlp]
    return LayerParts(
        input_norm=f"{prefix}.input_layernorm",
        post_attention_norm=f"{prefix}.post_attention_layernorm",
        query=f"{attention}.q_proj",
        key=f"{attention}.k_proj",
        value=f"{attention}.v_proj",
        output=f"{attention}.o_proj",
        mlps=tuple(Mlp(f"{m}.gate_proj", f"{m}.up_proj", f"{m}.down_proj") for m in mlps),
        router=f"{mlp}.gate" if experts else None,
    )
