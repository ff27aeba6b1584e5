"""What a conversion will do, decided from headers alone: every refusal happens here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch

from qwen3_ascend.checkpoint.architecture import (
    EMBEDDING,
    LM_HEAD,
    LinearSpec,
    ModelSpec,
    Spec,
    TensorSpec,
    lm_head_spec,
    model_spec,
)
from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.checkpoint.layout import ND, Layout
from qwen3_ascend.checkpoint.linear import BIAS, stored_forms
from qwen3_ascend.checkpoint.schemes import BF16, W4A16, Scheme
from qwen3_ascend.checkpoint.schemes.grid import IntegerScheme
from qwen3_ascend.checkpoint.schemes.pieces import PIECE_BYTES, Piece
from qwen3_ascend.checkpoint.target import ASCEND_A2_A3, Target
from qwen3_ascend.convert.calibration.data import Calibration
from qwen3_ascend.convert.encodings import FLOAT, Encoding, check_floats
from qwen3_ascend.convert.exchange import WEIGHT
from qwen3_ascend.convert.options import ConvertOptions
from qwen3_ascend.convert.output.weight_file import WeightFilePlan, fill_files
from qwen3_ascend.convert.quantizers import QUANTIZERS
from qwen3_ascend.convert.recipe import NEAREST, Recipe, Rule
from qwen3_ascend.convert.source.foreign import tensor_hint
from qwen3_ascend.convert.source.names import HEAD
from qwen3_ascend.convert.source.quantization import NOT_QUANTIZED, Quantization
from qwen3_ascend.convert.transforms import TRANSFORMS, FittedTransform, Transform
from qwen3_ascend.convert.transforms.parts import model_parts
from qwen3_ascend.convert.transforms.whole import Touched, touched
from qwen3_ascend.convert.weights import CHUNK_BYTES, chunk_outputs
from qwen3_ascend.errors import RecipeError, SourceError
from qwen3_ascend.files.safetensors import Form, TensorSlot
from qwen3_ascend.files.text import parse_size

ENDS = (WEIGHT, BIAS)

STEM = "ascend"
"""What the names of weight files begin with: no other loader takes them for files it can read."""


@dataclass(frozen=True)
class Item:
    """One weight to be written: a linear, or a plain tensor (embedding, norm).

    A plain tensor is a bfloat16 matrix in row-major order like any other, of one row if it is a
    vector; only its name is its own.

    Attributes:
        spec: what it is in the model.
        scheme, layout: what becomes of it.
        stored: the form of each stored tensor, by suffix.
        encoding: how the source holds its weight.
        weights: the source tensors that its weight is made of.
        source_bytes: of its tensors in the source.
        block: how many neighbouring outputs have to be known together, since a transform mixes
            them; 0 if its weight stays as it is.
        consults: further source tensors, which decide how its weight is changed.
        decoded: weights of the largest of these that has to be decoded as a whole.
        quantizer: the name of who chooses its codes, if they are chosen.
    """

    spec: Spec
    scheme: Scheme
    layout: Layout
    stored: Mapping[str, Form]
    encoding: Encoding
    weights: tuple[str, ...]
    source_bytes: int
    block: int = 0
    consults: tuple[str, ...] = ()
    decoded: int = 0
    quantizer: str = NEAREST

    @property
    def name(self) -> str:
        """Name of the linear or tensor."""
        return self.spec.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Its logical shape [*batch, N, K]; the batch are the experts, if there are any."""
        return self.spec.shape if len(self.spec.shape) > 1 else (1, *self.spec.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """The logical shape (N, K) of each of its matrices."""
        rows, columns = self.shape[-2:]
        return rows, columns

    @property
    def matrices(self) -> tuple[tuple[str, ...], ...]:
        """What is stacked to each of its matrices, by its name in the source."""
        if isinstance(self.spec, TensorSpec):
            return ((self.name.removesuffix(f".{WEIGHT}"),),)
        return self.spec.matrices

    @property
    def parts(self) -> tuple[str, ...]:
        """What its weight is made of, matrix by matrix."""
        return tuple(part for parts in self.matrices for part in parts)

    @property
    def biases(self) -> tuple[str, ...]:
        """The source tensors that its bias is made of."""
        if isinstance(self.spec, TensorSpec) or not self.spec.bias:
            return ()
        return tuple(f"{source}.{BIAS}" for source in self.parts)

    @property
    def reads(self) -> tuple[str, ...]:
        """All source tensors that it is made of."""
        return (*self.weights, *self.biases)

    @property
    def needs(self) -> tuple[str, ...]:
        """All source tensors that have to be there to make it."""
        return tuple(dict.fromkeys((*self.reads, *self.consults)))

    @property
    def changed(self) -> tuple[tuple[str, ...], ...]:
        """What a transform calls the weights that are stacked, as `matrices`: those of the source,
        but for a head that is made of the embedding and becomes another weight."""
        return ((LM_HEAD,),) if self.name == LM_HEAD else self.matrices

    def stored_name(self, suffix: str) -> str:
        """The full name of a stored tensor."""
        return self.name if isinstance(self.spec, TensorSpec) else f"{self.name}.{suffix}"

    @property
    def forms(self) -> dict[str, Form]:
        """The form of each stored tensor, by full name."""
        return {self.stored_name(suffix): form for suffix, form in self.stored.items()}

    @property
    def nbytes(self) -> int:
        """Bytes that will be written."""
        return sum(form.nbytes for form in self.stored.values())

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """How its weight is divided."""
        return self.scheme.pieces(self.shape, self.layout)

    @property
    def piece_bytes(self) -> int:
        """Most memory that one piece of it takes while it is under way."""
        outputs, inputs = self.matrix
        piece = self.scheme.pieces(self.matrix, self.layout)[0]  # as of every matrix
        weights = (piece.stop - piece.start) * (inputs if piece.axis == "outputs" else outputs)
        weights_of_all = len(self.matrices) * outputs * (inputs + bool(self.biases))
        itemsize = -(-self.source_bytes // weights_of_all)
        if self.block:
            itemsize = torch.float32.itemsize
        taken = self.encoding.temporary_bytes(self.scheme, self.layout, itemsize)
        packing = max(taken * weights, PIECE_BYTES) + self._changed_bytes(piece)
        packing = max(packing, 2 * torch.float32.itemsize * self.decoded)
        return packing if self.quantizer == NEAREST else self._quantized_bytes(packing)

    def _quantized_bytes(self, packing: int) -> int:
        """Memory of a linear whose codes are chosen together, before they are packed: its integers
        and scales, what the quantizer needs, and a chunk."""
        assert isinstance(self.scheme, IntegerScheme)
        outputs, inputs = self.matrix
        chosen = outputs * (inputs + torch.float32.itemsize * self.scheme.grid.groups(inputs))
        chunk = Piece("outputs", 0, min(chunk_outputs(inputs), outputs))
        shared = QUANTIZERS[self.quantizer].shared_bytes(inputs)
        choosing = shared + chunk.stop * inputs * CHUNK_BYTES + self._changed_bytes(chunk)
        return chosen + max(choosing, packing)

    def _changed_bytes(self, piece: Piece) -> int:
        """Memory of the changed weights that are known together, float32: all, of which pieces are
        views, or those of a piece and of the blocks at its ends, and a copy of the piece. What is
        decoded is there as floats before it is changed."""
        outputs, inputs = self.matrix
        if not self.block:
            return 0
        around = 2 * (piece.stop - piece.start) + 2 * (self.block - 1)
        together = outputs if piece.axis == "inputs" else min(around, outputs)
        copies = 1 if self.encoding == FLOAT else 2
        return copies * torch.float32.itemsize * together * inputs


@dataclass(frozen=True)
class Plan:
    """A whole conversion.

    Attributes:
        config: of the model as it is stored: untied if the head gets a scheme of its own.
        target: the chip family that it is for.
        items: in the order of the model.
        ignored: source tensors that are left out, each with the reason.
        alike: of these, the ones that seem to equal a tensor that is stored, by its name; they are
            compared in full once they have been read.
        transforms: that make equivalent weights first.
        calibration: with what; None if nothing has to be known of the inputs of linears.
    """

    config: Qwen3Config
    recipe: Recipe
    target: Target
    items: tuple[Item, ...]
    weight_files: tuple[WeightFilePlan, ...]
    ignored: Mapping[str, str]
    alike: Mapping[str, str]
    transforms: tuple[Transform, ...] = ()
    calibration: Calibration | None = None

    @property
    def compared(self) -> tuple[str, ...]:
        """Source tensors that are read once more in the end, to hold one against another."""
        return (*self.alike, *(self.alike.values() if self.transforms else ()))

    @property
    def source_bytes(self) -> int:
        """Bytes that will be read."""
        return sum(item.source_bytes for item in self.items)

    @property
    def output_bytes(self) -> int:
        """Bytes of tensors that will be written."""
        return sum(item.nbytes for item in self.items)

    @property
    def parameters(self) -> int:
        """Weights of the model (a tied output projection counts once)."""
        distinct = {item.reads: item.spec.shape for item in self.items}
        return sum(math.prod(shape) for shape in distinct.values())

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
    max_file_bytes: int | str = ConvertOptions.max_file_bytes,
    target: Target = ASCEND_A2_A3,
    alike: Mapping[str, str] = MappingProxyType({}),
    quantization: Quantization = NOT_QUANTIZED,
) -> Plan:
    """Plans a conversion.

    Args:
        config: of the model, as its source ties or unties it.
        slots: type and shape of every source tensor.
        recipe: the rules.
        max_file_bytes: size at which a new output file begins.
        target: the chip family that the checkpoint is for.
        alike: see Plan.
        quantization: which linears of the source are quantized already.

    Raises:
        SourceError: a tensor is missing, has a wrong shape or type, or is unknown.
        RecipeError: a rule matches nothing, or does not fit the model or its source.
    """
    spec = model_spec(config)
    _check_rules(config, spec, recipe, quantization)
    _refuse_strangers(spec, slots, quantization)
    transforms = _transforms(recipe)
    stored_spec = _stored_spec(config, spec, recipe, transforms)
    made = (
        _plan_linear(part, slots, recipe, target, quantization)
        if isinstance(part, LinearSpec)
        else _plan_tensor(part, slots)
        for part in stored_spec
    )
    changes = touched(model_parts(config), transforms)
    consulted = _Consulted(slots, quantization, _decoded_sizes(spec, quantization))
    items = tuple(_changed(item, changes, recipe, quantization, consulted) for item in made)
    ignored = _unread(config, items, slots)
    weight_files = fill_files([item.forms for item in items], parse_size(max_file_bytes), STEM)
    stored = replace(config, tie_word_embeddings=stored_spec.lm_head is None)
    return Plan(stored, recipe, target, items, weight_files, ignored, alike, transforms)


def _transforms(recipe: Recipe) -> tuple[Transform, ...]:
    """Calibration sees the inputs of a layer as the transforms that need no data leave them."""
    named = tuple(TRANSFORMS[name] for name in recipe.transforms)
    for place, (before, after) in enumerate(itertools.pairwise(named)):
        if isinstance(before, FittedTransform) and not isinstance(after, FittedTransform):
            first, second = recipe.transforms[place : place + 2]
            raise RecipeError(
                f"recipe {recipe.name}: the transform {first} needs data and {second} does not: "
                f"name {second} before it"
            )
    return named


def _stored_spec(
    config: Qwen3Config, spec: ModelSpec, recipe: Recipe, transforms: Sequence[Transform]
) -> ModelSpec:
    """The weights that are stored: a tied head that is quantized, or becomes another weight than
    the embedding, is one of its own, made of the embedding."""
    unties = any(transform.unties for transform in transforms)
    if spec.lm_head or (recipe.rule_for(LM_HEAD).scheme == BF16() and not unties):
        return spec
    return replace(spec, lm_head=lm_head_spec(config, EMBEDDING))


def _refuse_strangers(
    spec: ModelSpec, slots: Mapping[str, TensorSlot], quantization: Quantization
) -> None:
    """Says what a source is whose tensors tell, before the first thing that it lacks."""
    known = {item.name for item in spec if isinstance(item, TensorSpec)}
    known |= {f"{part}.{end}" for item in spec.linears for part in item.all_sources for end in ENDS}
    for linear, encoding in quantization.encodings.items():
        known |= {f"{linear}.{suffix}" for suffix in encoding.known}
    for name in slots:
        if name not in known and (hint := tensor_hint(name)):
            raise SourceError(f"the source holds {name}, which tells {hint}")


def _all_linears(config: Qwen3Config, spec: ModelSpec) -> list[LinearSpec]:
    """Every linear a rule can speak of, the tied output projection included."""
    return [*spec.linears] if spec.lm_head else [*spec.linears, lm_head_spec(config)]


def _check_rules(
    config: Qwen3Config, spec: ModelSpec, recipe: Recipe, quantization: Quantization
) -> None:
    used: list[Rule] = []
    for linear in _all_linears(config, spec):
        _check_parts(linear, quantization)
        rules = [recipe.rule_for(source) for source in linear.sources]
        used += rules
        for source, rule in zip(linear.sources, rules, strict=True):
            _check_taken(source, rule, recipe, quantization)
            _check_quantizer(source, rule, recipe)
        _check_alike(linear, rules, recipe)
    for number, rule in enumerate(recipe.rules, 1):
        if not any(rule is other for other in used):  # two rules may be equal
            raise RecipeError(
                f"recipe {recipe.name}: rule {number} ({rule.match!r}) decides nothing: no linear "
                f"matches it, or earlier rules match them all"
            )


def _check_alike(linear: LinearSpec, rules: Sequence[Rule], recipe: Recipe) -> None:
    """The parts of a fused linear have one scheme, and one quantizer finds their codes."""
    for what in ("scheme", "quantizer"):
        given = [str(getattr(rule, what)) for rule in rules]
        if len({*given}) > 1:
            names = (source.rpartition(".")[2] for source in linear.sources)
            said = ", ".join(f"{name}: {one}" for name, one in zip(names, given, strict=True))
            raise RecipeError(
                f"recipe {recipe.name}: {linear.name} is one fused linear, but its parts are "
                f"given different {what}s ({said})"
            )


def _check_quantizer(linear: str, rule: Rule, recipe: Recipe) -> None:
    if rule.quantizer != NEAREST and not isinstance(rule.scheme, IntegerScheme):
        raise RecipeError(
            f"recipe {recipe.name} gives the quantizer {rule.quantizer} to {linear}, whose scheme "
            f"{rule.scheme} has no integers to choose: leave the quantizer out"
        )
    if rule.quantizer != NEAREST and isinstance(rule.scheme, W4A16) and rule.scheme.zero_points:
        raise RecipeError(
            f"recipe {recipe.name} gives the quantizer {rule.quantizer} to {linear}, whose scheme "
            f"is {rule.scheme}: only {NEAREST} finds zero points; leave zero_points or the "
            f"quantizer out"
        )


def _check_parts(linear: LinearSpec, quantization: Quantization) -> None:
    """A fused linear is taken as a whole, or chosen as a whole; engines refuse the rest as well."""
    kinds = {source: quantization.encoding(source).kind for source in linear.all_sources}
    if len({*kinds.values()}) > 1:
        said = ", ".join(f"{source.rpartition('.')[2]}: {kind}" for source, kind in kinds.items())
        raise SourceError(
            f"{linear.name} is one fused linear, but the source holds its parts differently "
            f"({said}): quantize all of them alike"
        )


def _check_taken(linear: str, rule: Rule, recipe: Recipe, quantization: Quantization) -> None:
    """A linear that came quantized keeps its codes, unless it can be decoded."""
    encoding = quantization.encoding(linear)
    if encoding.under(_kept(recipe, rule.scheme)) is None:
        does, choice = f"gives {rule.scheme} to", ""
        if recipe.transforms:
            does, choice = "transforms the weights of", ", choose a recipe without transforms"
        raise RecipeError(
            f"recipe {recipe.name} {does} {linear}, which the source holds as "
            f"{encoding.scheme} ({quantization.format}): leave --recipe out to keep what the "
            f"source holds{choice}, or convert the original model"
        )


def _kept(recipe: Recipe, scheme: Scheme) -> Scheme | None:
    """The scheme whose codes may be taken: none if all weights become others first."""
    return None if recipe.transforms else scheme


def _plan_tensor(spec: TensorSpec, slots: Mapping[str, TensorSlot]) -> Item:
    stored = {WEIGHT: Form(torch.bfloat16, spec.shape)}
    check_floats(spec.name, spec.shape, slots)
    nbytes = slots[spec.name].nbytes
    return Item(spec, BF16(), ND, stored, FLOAT, (spec.name,), nbytes)


def _plan_linear(
    spec: LinearSpec,
    slots: Mapping[str, TensorSlot],
    recipe: Recipe,
    target: Target,
    quantization: Quantization,
) -> Item:
    tied = spec.sources == (EMBEDDING,)
    rule = recipe.rule_for(spec.name if tied else spec.sources[0])
    scheme, weights = rule.scheme, list[str]()
    encoding = quantization.encoding(spec.all_sources[0]).under(_kept(recipe, scheme))
    assert encoding is not None  # the rules have been checked
    for sources in spec.matrices:
        for source, rows in zip(sources, spec.parts, strict=True):
            suffixes = encoding.suffixes(source, (rows, spec.inputs), slots)
            weights += [f"{source}.{suffix}" for suffix in suffixes]
            if spec.bias:
                check_floats(f"{source}.{BIAS}", (rows,), slots)
    if refusal := target.refusal(scheme, spec.shape):
        raise RecipeError(f"recipe {recipe.name}: {spec.name}: {refusal}")
    layout = target.layout(scheme, spec.name, spec.shape)
    stored = stored_forms(scheme, spec.shape, layout, spec.bias)
    quantizer = rule.quantizer if encoding.codes == "chosen" else NEAREST
    item = Item(spec, scheme, layout, stored, encoding, tuple(weights), 0, quantizer=quantizer)
    return replace(item, source_bytes=sum(slots[name].nbytes for name in item.reads))


class _Consulted:
    """The tensors that decide a change, looked up once for all items that it is the change of."""

    def __init__(
        self,
        slots: Mapping[str, TensorSlot],
        quantization: Quantization,
        sizes: Mapping[str, int],
    ) -> None:
        """Args:
        slots: of every source tensor.
        quantization: of the source.
        sizes: see `_decoded_sizes`.
        """
        self._slots, self._quantization, self._sizes = slots, quantization, sizes
        self._known: dict[int, tuple[tuple[str, ...], int]] = {}

    def of(self, consults: tuple[str, ...]) -> tuple[tuple[str, ...], int]:
        """The tensors of the linears of `Touched.consults`, and the weights of the largest one that
        is decoded as a whole."""
        if id(consults) not in self._known:  # the plan keeps what it is the place of
            encoding = self._quantization.encoding
            stored = [s for name in consults for s in encoding(name).stored(name, self._slots)]
            decoded = max((self._sizes.get(name, 0) for name in consults), default=0)
            self._known[id(consults)] = tuple(stored), decoded
        return self._known[id(consults)]


def _changed(
    item: Item,
    changes: Mapping[str, Touched],
    recipe: Recipe,
    quantization: Quantization,
    consulted: _Consulted,
) -> Item:
    """An item with what transforms will do to it."""
    names = (name for parts in item.changed for name in parts)
    found = [changes[name] for name in names if name in changes]
    if not found:
        return item
    if item.encoding.codes == "taken":
        raise RecipeError(
            f"recipe {recipe.name}: its transforms ({', '.join(recipe.transforms)}) change "
            f"{item.parts[0]}, which the source holds quantized ({quantization.format}): use a "
            f"recipe without transforms, or convert the original model"
        )
    shared = {id(touch.consults): touch.consults for touch in found}.values()  # by all of a layer
    looked_up = [consulted.of(consults) for consults in shared]
    consults = tuple(dict.fromkeys(name for stored, _ in looked_up for name in stored))
    block, decoded = max(touch.block for touch in found), max(size for _, size in looked_up)
    return replace(item, block=block, consults=consults, decoded=decoded)


def _decoded_sizes(spec: ModelSpec, quantization: Quantization) -> dict[str, int]:
    """How many weights each linear has that the source holds as codes."""
    if not quantization.encodings:
        return {}
    return {
        source: rows * linear.inputs
        for linear in spec.linears
        for sources in linear.matrices
        for source, rows in zip(sources, linear.parts, strict=True)
        if quantization.encoding(source) != FLOAT
    }


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
        if config.tie_word_embeddings and name == HEAD:
            ignored[name] = "config.json ties it to the embedding"
        elif name.endswith(".rotary_emb.inv_freq"):
            ignored[name] = "derived from the configuration"
        else:
            raise SourceError(
                f"the source holds {name}, which is no part of the Qwen3 that config.json "
                f"describes (wrong config.json, or an already quantized model?)"
            )
    return ignored
