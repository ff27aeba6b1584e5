"""What a Qwen3 is made of, as named data: its tensors, and which of them form one linear.

A `ModelSpec` names every weight once. The converter walks it, `verify` holds a checkpoint against
it, and the loader makes device weights of it field by field, so that no order has to be agreed on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

from qwen3_ascend.checkpoint.config import ExpertsConfig, Qwen3Config
from qwen3_ascend.checkpoint.layout import Cut

LM_HEAD = "lm_head"
EMBEDDING = "model.embed_tokens"

ROUTER = "gate.weight"
"""The weight of a layer's router, below "mlp": a plain tensor, of which engines make a linear."""

EACH = "*"
"""Stands for the number of an expert in the name of a linear that all experts of a layer have."""


@dataclass(frozen=True)
class TensorSpec:
    """A plain tensor, such as a norm's weight: its name and its shape."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class LinearSpec:
    """One linear as the runtime computes it, and the Hugging Face linears it is fused of.

    Attributes:
        name: such as "model.layers.0.self_attn.qkv_proj".
        sources: such as ("model.layers.0.self_attn.q_proj", ...), concatenated along outputs. Those
            of experts have EACH in the place of the expert's number.
        parts: outputs of each source; their sum is N.
        inputs: K.
        cut: how tensor parallelism divides it.
        bias: whether every source has a bias.
        experts: how many such linears are stored as one; 0 for a linear by itself.
    """

    name: str
    sources: tuple[str, ...]
    parts: tuple[int, ...]
    inputs: int
    cut: Cut
    bias: bool
    experts: int = 0

    @property
    def outputs(self) -> int:
        """N, the outputs of the fused linear."""
        return sum(self.parts)

    @property
    def matrix(self) -> tuple[int, int]:
        """Logical (N, K), of each expert if there are experts."""
        return self.outputs, self.inputs

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical (N, K), or (experts, N, K)."""
        return (self.experts, *self.matrix) if self.experts else self.matrix

    @cached_property
    def matrices(self) -> tuple[tuple[str, ...], ...]:
        """The sources of each stored matrix: those of each expert, or the only ones."""
        return of_each_expert(self.sources, self.experts)

    @cached_property
    def all_sources(self) -> tuple[str, ...]:
        """Every linear of the source that it is made of, expert by expert."""
        return tuple(source for sources in self.matrices for source in sources)


def of_each_expert(sources: Sequence[str], experts: int) -> tuple[tuple[str, ...], ...]:
    """The names of each expert's linears; with no experts, the names themselves."""
    if not experts:
        return (tuple(sources),)
    return tuple(
        tuple(source.replace(EACH, str(expert)) for source in sources) for expert in range(experts)
    )


Spec = TensorSpec | LinearSpec
"""One weight of a model."""


@dataclass(frozen=True)
class MlpSpec:
    """The gated MLP of a layer: down(silu(gate(x)) * up(x))."""

    gate_up: LinearSpec
    down: LinearSpec


@dataclass(frozen=True)
class ExpertsSpec:
    """The mixture of experts of a layer: the sum of the chosen experts' MLPs, weighted.

    Attributes:
        router: [experts, hidden], whose product with x decides; never quantized.
        gate_up, down: of all experts.
    """

    router: TensorSpec
    gate_up: LinearSpec
    down: LinearSpec


@dataclass(frozen=True)
class LayerSpec:
    """The weights of one decoder layer: the norms, then the linears."""

    input_norm: TensorSpec
    query_norm: TensorSpec
    key_norm: TensorSpec
    post_attention_norm: TensorSpec
    qkv: LinearSpec
    output: LinearSpec
    mlp: MlpSpec | ExpertsSpec

    def __iter__(self) -> Iterator[Spec]:
        """Every weight of the layer."""
        return _weights(self)


@dataclass(frozen=True)
class ModelSpec:
    """The weights of a whole model.

    Attributes:
        embedding: [vocab, hidden].
        layers: in forward order.
        final_norm: before the output projection.
        lm_head: the output projection; None if the embedding serves as it (tied embeddings).
    """

    embedding: TensorSpec
    layers: tuple[LayerSpec, ...]
    final_norm: TensorSpec
    lm_head: LinearSpec | None

    def __iter__(self) -> Iterator[Spec]:
        """Every weight that is stored, layer by layer: the order of the weight files."""
        return _weights(self)

    @property
    def linears(self) -> tuple[LinearSpec, ...]:
        """The linears that are stored."""
        return tuple(spec for spec in self if isinstance(spec, LinearSpec))


def _weights(spec: object) -> Iterator[Spec]:
    if isinstance(spec, Spec):
        yield spec
    elif isinstance(spec, tuple):
        for item in spec:
            yield from _weights(item)
    elif spec is not None:
        for field in fields(spec):  # type: ignore[arg-type]  # one of the dataclasses above
            yield from _weights(getattr(spec, field.name))


def model_spec(config: Qwen3Config) -> ModelSpec:
    """The weights of the model that a configuration describes."""
    layers = tuple(layer_spec(config, layer) for layer in range(config.num_layers))
    return ModelSpec(
        embedding=TensorSpec(f"{EMBEDDING}.weight", (config.vocab_size, config.hidden_size)),
        layers=layers,
        final_norm=TensorSpec("model.norm.weight", (config.hidden_size,)),
        lm_head=None if config.tie_word_embeddings else lm_head_spec(config),
    )


def layer_spec(config: Qwen3Config, layer: int) -> LayerSpec:
    """The weights of decoder layer number `layer`, counted from 0."""
    prefix = f"model.layers.{layer}"
    attention = f"{prefix}.self_attn"
    hidden, bias = config.hidden_size, config.attention_bias
    query, key_value = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def norm(name: str, size: int) -> TensorSpec:
        return TensorSpec(f"{prefix}.{name}.weight", (size,))

    return LayerSpec(
        input_norm=norm("input_layernorm", hidden),
        query_norm=norm("self_attn.q_norm", config.head_dim),
        key_norm=norm("self_attn.k_norm", config.head_dim),
        post_attention_norm=norm("post_attention_layernorm", hidden),
        qkv=LinearSpec(
            f"{attention}.qkv_proj",
            tuple(f"{attention}.{name}" for name in ("q_proj", "k_proj", "v_proj")),
            (query, key_value, key_value),
            hidden,
            "outputs",
            bias,
        ),
        output=_single(f"{attention}.o_proj", hidden, query, bias),
        mlp=_experts(config, experts, f"{prefix}.mlp")
        if (experts := config.experts_of(layer))
        else _mlp(config, f"{prefix}.mlp"),
    )


def lm_head_spec(config: Qwen3Config, source: str = LM_HEAD) -> LinearSpec:
    """The output projection; with tied embeddings it has no tensor of its own.

    Args:
        config: of the model.
        source: what it is made of: EMBEDDING if it is quantized while the embedding that the
            source ties it to is not.
    """
    shape = (config.vocab_size, config.hidden_size)
    return LinearSpec(LM_HEAD, (source,), (shape[0],), shape[1], "outputs", False)


def _mlp(config: Qwen3Config, prefix: str) -> MlpSpec:
    hidden, inner = config.hidden_size, config.intermediate_size
    sources = (f"{prefix}.gate_proj", f"{prefix}.up_proj")
    gate_up = LinearSpec(
        f"{prefix}.gate_up_proj", sources, (inner, inner), hidden, "outputs", False
    )
    return MlpSpec(gate_up, _single(f"{prefix}.down_proj", hidden, inner, False))


def _experts(config: Qwen3Config, experts: ExpertsConfig, prefix: str) -> ExpertsSpec:
    hidden, inner, count = config.hidden_size, experts.intermediate_size, experts.count
    stored, each = f"{prefix}.experts", f"{prefix}.experts.{EACH}"
    sources = (f"{each}.gate_proj", f"{each}.up_proj")
    return ExpertsSpec(
        TensorSpec(f"{prefix}.{ROUTER}", (count, hidden)),
        LinearSpec(
            f"{stored}.gate_up_proj", sources, (inner, inner), hidden, "outputs", False, count
        ),
        LinearSpec(
            f"{stored}.down_proj", (f"{each}.down_proj",), (hidden,), inner, "inputs", False, count
        ),
    )


def _single(name: str, outputs: int, inputs: int, bias: bool) -> LinearSpec:
    """A linear that is fused of nothing else and sums over what the one before it has made."""
    return LinearSpec(name, (name,), (outputs,), inputs, "inputs", bias)
