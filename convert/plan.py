"""What a conversion will do, decided from headers alone: every refusal happens here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from qwen3_ascend.checkpoint.architecture import LM_HEAD, LinearSpec, lm_head_spec, model_spec
from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.checkpoint.layout import ND, Layout
from qwen3_ascend.checkpoint.schemes import BF16, SCHEMES
from qwen3_ascend.checkpoint.schemes.base import StoredForm
from qwen3_ascend.checkpoint.schemes.pieces import PIECE_BYTES, Piece
from qwen3_ascend.convert.output.weight_file import WeightFilePlan, weight_file_name
from qwen3_ascend.convert.recipe import Recipe, Rule
from qwen3_ascend.errors import CheckpointError, RecipeError
from qwen3_ascend.files.safetensors import NAMES, TensorSlot, tensor_nbytes

SOURCE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

PLAIN_DTYPE = torch.bfloat16
"""Type of the tensors that are not linears: embedding and norms."""

MAX_FILE_BYTES = 4 << 30

MAX_QUANT_MATMUL_DIM = 65535
"""npu_quant_matmul refuses a larger last dimension (torch_npu documentation of the operator)."""


@dataclass(frozen=True)
class LinearPlan:
    """One linear to be written.

    Attributes:
        spec: what it is fused of.
        scheme, layout: what becomes of it.
        stored: its tensors by suffix.
        source_bytes: of its tensors in the source.
    """

    spec: LinearSpec
    scheme: str
    layout: Layout
    stored: Mapping[str, StoredForm]
    source_bytes: int

    @property
    def name(self) -> str:
        """Name of the linear."""
        return self.spec.name

    @property
    def reads(self) -> tuple[str, ...]:
        """Source tensors it is made of."""
        suffixes = ("weight", "bias") if self.spec.bias else ("weight",)
        return tuple(f"{source}.{suffix}" for suffix in suffixes for source in self.spec.sources)

    @property
    def forms(self) -> dict[str, StoredForm]:
        """Its tensors by their full names."""
        return {f"{self.name}.{suffix}": form for suffix, form in self.stored.items()}

    @property
    def piece_bytes(self) -> int:
        """Most memory that one piece of it takes while it is under way."""
        outputs, inputs = self.spec.outputs, self.spec.inputs
        pieces = SCHEMES[self.scheme].pieces((outputs, inputs), self.layout)
        return _piece_bytes(pieces[0], (outputs, inputs), self.source_bytes)


@dataclass(frozen=True)
class TensorPlan:
    """A plain tensor (embedding, norm) to be written in bfloat16."""

    name: str
    shape: tuple[int, ...]
    source_bytes: int

    @property
    def reads(self) -> tuple[str, ...]:
        """Source tensors it is made of."""
        return (self.name,)

    @property
    def forms(self) -> dict[str, StoredForm]:
        """Its tensor by name."""
        return {self.name: (PLAIN_DTYPE, self.shape)}

    @property
    def piece_bytes(self) -> int:
        """Most memory that one piece of it takes while it is under way."""
        shape = (1, *self.shape)[-2:]
        matrix = (shape[0], shape[1])
        return _piece_bytes(BF16.pieces(matrix, ND)[0], matrix, self.source_bytes)


Item = LinearPlan | TensorPlan


@dataclass(frozen=True)
class Plan:
    """A whole conversion.

    Attributes:
        items: in the order of the model.
        ignored: source tensors that are left out, each with the reason.
        hash_source: whether every source tensor that is read is hashed.
    """

    config: Qwen3Config
    recipe: Recipe
    items: tuple[Item, ...]
    weight_files: tuple[WeightFilePlan, ...]
    ignored: Mapping[str, str]
    hash_source: bool

    @property
    def source_bytes(self) -> int:
        """Bytes that will be read."""
        return sum(item.source_bytes for item in self.items)

    @property
    def output_bytes(self) -> int:
        """Bytes of tensors that will be written."""
        return sum(_nbytes(file.tensors) for file in self.weight_files)

    @property
    def parameters(self) -> int:
        """Weights of the model (a tied output projection counts once)."""
        return sum(
            item.spec.outputs * item.spec.inputs
            if isinstance(item, LinearPlan)
            else math.prod(item.shape)
            for item in self.items
        )

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each weight, scales and padding included."""
        return 8 * self.output_bytes / self.parameters

    @property
    def piece_bytes(self) -> int:
        """Most memory that one piece takes while it is under way."""
        return max(item.piece_bytes for item in self.items)


def make_plan(
    config: Qwen3Config,
    slots: Mapping[str, TensorSlot],
    recipe: Recipe,
    max_file_bytes: int = MAX_FILE_BYTES,
    hash_source: bool = False,
) -> Plan:
    """Plans a conversion.

    Args:
        config: of the model.
        slots: type and shape of every source tensor.
        recipe: the rules.
        max_file_bytes: size at which a new output file begins.
        hash_source: hash every source tensor that is read.

    Raises:
        CheckpointError: a tensor is missing, has a wrong shape or type, or is unknown.
        RecipeError: a rule matches nothing, or does not fit the model.
    """
    _check_rules(config, recipe)
    items = tuple(
        _plan_linear(entry, slots, recipe)
        if isinstance(entry, LinearSpec)
        else TensorPlan(entry.name, entry.shape, _source_bytes(entry.name, entry.shape, slots))
        for entry in model_spec(config)
    )
    ignored = _unread(config, items, slots)
    weight_files = _fill_files(items, max_file_bytes)
    return Plan(config, recipe, items, weight_files, ignored, hash_source)


def _piece_bytes(piece: Piece, shape: tuple[int, int], source_bytes: int) -> int:
    """A piece of a [N, K] weight and a copy of its source; of other floats also float64 blocks."""
    length = piece.stop - piece.start
    weights = length * (shape[1] if piece.axis == "rows" else shape[0])
    each = 4 if source_bytes <= PLAIN_DTYPE.itemsize * (shape[0] * shape[1] + shape[0]) else 32
    return max(each * weights, PIECE_BYTES)


def _nbytes(forms: Mapping[str, StoredForm]) -> int:
    return sum(tensor_nbytes(*form) for form in forms.values())


def _source_bytes(name: str, shape: tuple[int, ...], slots: Mapping[str, TensorSlot]) -> int:
    """Checks one source tensor and returns its size."""
    slot = slots.get(name)
    if slot is None:
        raise CheckpointError(f"the source has no tensor {name}")
    if slot.dtype not in SOURCE_DTYPES:
        known = ", ".join(NAMES[dtype] for dtype in SOURCE_DTYPES)
        raise CheckpointError(
            f"tensor {name} is {NAMES[slot.dtype]}; only {known} can be converted: "
            f"use the original, unquantized model"
        )
    if slot.shape != shape:
        raise CheckpointError(
            f"tensor {name} is {list(slot.shape)}, but config.json asks for {list(shape)}"
        )
    return slot.nbytes


def _all_linears(config: Qwen3Config) -> list[LinearSpec]:
    """Every linear a rule can speak of, the tied output projection included."""
    spec = model_spec(config)
    return [*spec.linears, *(() if spec.lm_head else (lm_head_spec(config),))]


def _check_rules(config: Qwen3Config, recipe: Recipe) -> None:
    used: list[Rule] = []
    for linear in _all_linears(config):
        rules = [recipe.rule_for(source) for source in linear.sources]
        used += rules
        choices = {(rule.scheme, rule.layout) for rule in rules}
        if len(choices) > 1:
            said = ", ".join(
                f"{source.rpartition('.')[2]}: {rule.scheme}/{rule.layout}"
                for source, rule in zip(linear.sources, rules, strict=True)
            )
            raise RecipeError(
                f"recipe {recipe.name}: {linear.name} is one fused linear, but its parts are "
                f"given different schemes or layouts ({said})"
            )
    for number, rule in enumerate(recipe.rules, 1):
        if not any(rule is other for other in used):  # two rules may be equal
            raise RecipeError(
                f"recipe {recipe.name}: rule {number} ({rule.match!r}) decides nothing: no linear "
                f"matches it, or earlier rules match them all"
            )
    if config.tie_word_embeddings and recipe.rule_for(LM_HEAD).scheme != "bf16":
        raise RecipeError(
            f"recipe {recipe.name}: lm_head is tied to the embedding, which stays bf16; "
            f"put a rule before the others: match: lm_head, scheme: bf16"
        )


def _plan_linear(spec: LinearSpec, slots: Mapping[str, TensorSlot], recipe: Recipe) -> LinearPlan:
    rule = recipe.rule_for(spec.sources[0])
    source_bytes = 0
    for source, rows in zip(spec.sources, spec.parts, strict=True):
        source_bytes += _source_bytes(f"{source}.weight", (rows, spec.inputs), slots)
        if spec.bias:
            source_bytes += _source_bytes(f"{source}.bias", (rows,), slots)
    shape = (spec.outputs, spec.inputs)
    if rule.scheme != "bf16" and max(shape) > MAX_QUANT_MATMUL_DIM:
        raise RecipeError(
            f"recipe {recipe.name}: {spec.name} is {list(shape)}, but npu_quant_matmul refuses "
            f"dimensions above {MAX_QUANT_MATMUL_DIM}; give it the scheme bf16"
        )
    scheme = SCHEMES[rule.scheme]
    plain = rule.layout == "nd" or (rule.layout == "auto" and spec.name == LM_HEAD)
    layout = ND if plain else scheme.default_layout()
    stored = scheme.stored(shape, layout, spec.bias)
    return LinearPlan(spec, rule.scheme, layout, stored, source_bytes)


def _unread(
    config: Qwen3Config,
    items: Sequence[Item],
    slots: Mapping[str, TensorSlot],
) -> dict[str, str]:
    """Source tensors that are left out, each with the reason; refuses those nobody can explain."""
    read = {name for item in items for name in item.reads}
    ignored: dict[str, str] = {}
    for name in slots:
        if name in read:
            continue
        if config.tie_word_embeddings and name == f"{LM_HEAD}.weight":
            ignored[name] = "config.json ties it to the embedding"
        elif name.endswith(".rotary_emb.inv_freq"):
            ignored[name] = "derived from the configuration"
        else:
            raise CheckpointError(
                f"the source holds {name}, which is no part of the Qwen3 that config.json "
                f"describes (wrong config.json, or an already quantized model?)"
            )
    return ignored


def _fill_files(items: Sequence[Item], max_file_bytes: int) -> tuple[WeightFilePlan, ...]:
    """Fills files in order; the tensors of one linear stay together."""
    groups: list[dict[str, StoredForm]] = [{}]
    filled = 0
    for item in items:
        nbytes = _nbytes(item.forms)
        if groups[-1] and filled + nbytes > max_file_bytes:
            groups.append({})
            filled = 0
        groups[-1].update(item.forms)
        filled += nbytes
    return tuple(
        WeightFilePlan(weight_file_name(index, len(groups)), group)
        for index, group in enumerate(groups, 1)
    )
