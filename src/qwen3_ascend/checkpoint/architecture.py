"""What a Qwen3 is made of: its tensors, and which of them form one linear."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.checkpoint.layout import Cut

EMBEDDING = "model.embed_tokens"


FINAL_NORM = "model.norm"


LM_HEAD = "lm_head"


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
            f"{attention}.qkv_proj", qkv, (query, key_value, key_value), hidden, "outputs", bias
        ),
        LinearSpec(output, (output,), (hidden,), query, "inputs", bias),
        LinearSpec(f"{mlp}.gate_up_proj", gate_up, (inner, inner), hidden, "outputs", False),
        LinearSpec(down, (down,), (hidden,), inner, "inputs", False),
    )


def lm_head_linear(config: Qwen3Config) -> LinearSpec:
    """The output projection; with tied embeddings it has no tensor of its own."""
    return LinearSpec(
        LM_HEAD, (LM_HEAD,), (config.vocab_size,), config.hidden_size, "outputs", False
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
