"""The formats of an export: how each states a scheme, and the files that say what was stated.

A format lists the schemes that it can state, each with an `Expression`; any other is refused by
name. So a new scheme is one line in each format that has words for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from qwen3_ascend.checkpoint.architecture import LM_HEAD
from qwen3_ascend.checkpoint.companions import CONFIG_NAME
from qwen3_ascend.checkpoint.linear import BIAS, Linear
from qwen3_ascend.checkpoint.schemes import BF16, W4A16, W8A8, W8A16, Scheme, W8A8Static
from qwen3_ascend.checkpoint.schemes.w8a8_static import folded_bias
from qwen3_ascend.checkpoint.target import ASCEND_A2_A3
from qwen3_ascend.convert import exchange
from qwen3_ascend.convert.exchange import WeightNames
from qwen3_ascend.convert.export.item import ExportItem, Expression
from qwen3_ascend.convert.options import EXPORT_FORMATS
from qwen3_ascend.errors import OptionError
from qwen3_ascend.files.json_file import indented
from qwen3_ascend.files.safetensors import Form


@dataclass(frozen=True)
class Floats:
    """weight: bfloat16 [N, K], what is stored or, of codes, what they stand for, rounded once."""

    is_quantized: ClassVar[bool] = False
    undivided: ClassVar[tuple[str, ...]] = ()
    shared: ClassVar[Mapping[str, int]] = {}

    def keeping_scales(self) -> Floats:
        return self

    def forms(self, shape: Sequence[int]) -> dict[str, Form]:
        return {exchange.WEIGHT: Form(torch.bfloat16, tuple(shape))}

    def tensors(self, linear: Linear) -> dict[str, Tensor]:
        return {exchange.WEIGHT: linear.dequantize().to(torch.bfloat16)}

    def constants(self, shape: Sequence[int]) -> dict[str, Tensor]:
        return {}


@dataclass(frozen=True)
class Int8:
    """weight: int8 [N, K]; weight_scale [N, 1] of a type; perhaps weight_offset, which is zero."""

    is_quantized: ClassVar[bool] = True
    undivided: ClassVar[tuple[str, ...]] = ()
    shared: ClassVar[Mapping[str, int]] = {}
    scale: torch.dtype
    offset: bool = False

    def keeping_scales(self) -> Int8:
        return replace(self, scale=torch.float32)

    def forms(self, shape: Sequence[int]) -> dict[str, Form]:
        return exchange.int8_forms(shape, self.scale, self.offset)

    def tensors(self, linear: Linear) -> dict[str, Tensor]:
        return exchange.int8_tensors(linear.codes(), self.scale, self.offset)

    def constants(self, shape: Sequence[int]) -> dict[str, Tensor]:
        return {}


@dataclass(frozen=True)
class Packed:
    """weight_packed: codes along the inputs, in int32; weight_scale: bfloat16 [N, G]; weight_shape;
    perhaps weight_zero_point: those of groups along the outputs, in int32 [N * bits / 32, G].

    Attributes:
        bits: of a code, 4 or 8.
        group: inputs that share a scale; None if all do.
        zero_points: whether they share a zero point as well.
    """

    is_quantized: ClassVar[bool] = True
    undivided: ClassVar[tuple[str, ...]] = ()
    bits: int
    group: int | None = None
    zero_points: bool = False

    @property
    def shared(self) -> Mapping[str, int]:
        return {exchange.WEIGHT_ZERO_POINT: 32 // self.bits}

    def keeping_scales(self) -> Packed:
        return self

    def forms(self, shape: Sequence[int]) -> dict[str, Form]:
        return exchange.packed_forms(shape, self.bits, self.group, self.zero_points)

    def tensors(self, linear: Linear) -> dict[str, Tensor]:
        return exchange.packed_tensors(linear.codes(), self.bits)

    def constants(self, shape: Sequence[int]) -> dict[str, Tensor]:
        return {exchange.WEIGHT_SHAPE: torch.tensor(tuple(shape))}


@dataclass(frozen=True)
class StaticInt8:
    """weight: int8 [N, K]; deq_scale float32 and quant_bias int32 [N], with the bias folded in;
    input_scale and input_offset float32 [1], the same for all parts of a fused linear."""

    is_quantized: ClassVar[bool] = True
    undivided: ClassVar[tuple[str, ...]] = (exchange.INPUT_SCALE, exchange.INPUT_OFFSET)
    shared: ClassVar[Mapping[str, int]] = {}

    def keeping_scales(self) -> StaticInt8:
        return self

    def forms(self, shape: Sequence[int]) -> dict[str, Form]:
        outputs = tuple(shape[:1])
        return {
            exchange.WEIGHT: Form(torch.int8, tuple(shape)),
            exchange.DEQ_SCALE: Form(torch.float32, outputs),
            exchange.QUANT_BIAS: Form(torch.int32, outputs),
            **{suffix: Form(torch.float32, (1,)) for suffix in self.undivided},
        }

    def tensors(self, linear: Linear) -> dict[str, Tensor]:
        codes = linear.codes()
        return {
            exchange.WEIGHT: codes["weight"],
            exchange.DEQ_SCALE: codes["deq_scale"],
            exchange.QUANT_BIAS: folded_bias(linear),
            **{suffix: codes[suffix].float() for suffix in self.undivided},
        }

    def constants(self, shape: Sequence[int]) -> dict[str, Tensor]:
        return {}


class Format(ABC):
    """A format. What it is called, what it can state, and its files beside the weights."""

    name: ClassVar[str]
    title: ClassVar[str]
    """For people."""

    weight_names: ClassVar[WeightNames]
    usage: ClassVar[str]
    """Lines of the model card: how to load it, and in what."""

    expressions: ClassVar[Mapping[str, Expression]]
    """How each scheme is stated, by the scheme's name."""

    of_experts: ClassVar[tuple[str, ...] | None] = None
    """Names of the schemes that it can state of experts; None for all."""

    def states(self, scheme: Scheme) -> Expression | None:
        """How a scheme is stated; None if this format has no words for it."""
        return self.expressions.get(scheme.name)

    def expression(
        self, linear: str, scheme: Scheme, taken: bool = False, experts: bool = False
    ) -> Expression:
        """How the scheme of a linear is stated; OptionError naming both if it cannot be.

        Args:
            linear: its name.
            scheme: what it is stored in.
            taken: whether its codes were taken from a source, whose scales may be any float32.
            experts: whether it is a linear of all experts of a layer.
        """
        known = not experts or self.of_experts is None or scheme.name in self.of_experts
        found = self.states(scheme) if known else None
        if found is None:
            raise OptionError(
                f"format {self.name} cannot state {linear}, which has the scheme {scheme}; export "
                f"as {HuggingFace.name}, or convert the model with another recipe"
            )
        return found.keeping_scales() if taken else found

    @abstractmethod
    def files(self, config: Mapping[str, Any], items: Sequence[ExportItem]) -> dict[str, bytes]:
        """config.json and the files that say what the tensors are, by name.

        Args:
            config: config.json of a Qwen3 whose weights are bfloat16.
            items: everything that is exported.

        Raises:
            OptionError: if no engine would load the result.
        """


class HuggingFace(Format):
    """Plain bfloat16, as transformers saves a model."""

    name = "huggingface"
    title = "plain bfloat16"
    weight_names = exchange.HUGGINGFACE_WEIGHTS
    usage = """\
Quantized weights were turned back into bfloat16, each rounded once: this is for evaluation, and for
programs that know no quantized format. Activations are not quantized.

    transformers.AutoModelForCausalLM.from_pretrained(".", dtype="bfloat16")
    vllm serve .
"""

    @override
    def states(self, scheme: Scheme) -> Expression:
        return Floats()

    @override
    def files(self, config: Mapping[str, Any], items: Sequence[ExportItem]) -> dict[str, bytes]:
        return {CONFIG_NAME: indented(config)}


class CompressedTensors(Format):
    """int-quantized, or pack-quantized where weights alone are: bfloat16 scales, and a section of
    config.json."""

    name = "compressed-tensors"
    title = "compressed-tensors"
    weight_names = exchange.HUGGINGFACE_WEIGHTS
    usage = """\
The codes and scales are those of the checkpoint, unchanged; engines find the format by
`quantization_config` in config.json.

    vllm serve .
"""

    expressions: ClassVar[Mapping[str, Expression]] = {
        BF16.name: Floats(),
        W8A8.name: Int8(torch.bfloat16),
        W8A16.name: Packed(8),
    }

    @override
    def states(self, scheme: Scheme) -> Expression | None:
        if isinstance(scheme, W4A16):
            return Packed(4, scheme.group, scheme.zero_points)
        return super().states(scheme)

    @override
    def files(self, config: Mapping[str, Any], items: Sequence[ExportItem]) -> dict[str, bytes]:
        _require_quantized(self, items)
        linears = [item for item in items if item.is_linear]
        scheme = _one_quantized_scheme(linears)
        floats = [item for item in linears if not item.expression.is_quantized]
        ignore = [source for item in floats for source, _ in item.parts]
        # SGLang 0.5.23 asks for the linear that it fuses of them, and would fill it with noise; all
        # experts of a layer are one module to engines.
        ignore += [i.name for i in floats if len(i.parts) > 1 and not i.experts]
        ignore += dict.fromkeys(i.name.rpartition(".")[0] for i in floats if i.experts)
        targets = [exchange.LINEAR]
        heads = [item for item in linears if item.name == LM_HEAD]
        if not heads:
            ignore.append(LM_HEAD)  # tied to the embedding, but readers make a linear of it
        elif heads[0].expression.is_quantized:
            targets.append(LM_HEAD)
        section = exchange.compressed_tensors_config(targets, ignore, self._quantization(scheme))
        return {CONFIG_NAME: indented({**config, exchange.QUANTIZATION_CONFIG: section})}

    def _quantization(self, scheme: Scheme) -> Mapping[str, Any]:
        """What a group of config.json says of the linears of a scheme."""
        stated = self.states(scheme)
        if isinstance(stated, Packed):
            return exchange.weights_alone(stated.bits, stated.group, stated.zero_points)
        return exchange.INT8_DYNAMIC


class AscendV1(Format):
    """What ModelSlim writes: float32 scales and offsets, and a description of every tensor."""

    name = "ascendv1"
    title = "AscendV1 (ModelSlim)"
    weight_names = exchange.ASCENDV1_WEIGHTS
    usage = """\
The int8 codes and scales are those of the checkpoint, unchanged; engines find the format by
`quant_model_description.json`.

    vllm serve .                                      # vllm-ascend
    python -m sglang.launch_server --model-path .     # SGLang on Ascend
"""

    expressions: ClassVar[Mapping[str, Expression]] = {
        BF16.name: Floats(),
        W8A8.name: Int8(torch.float32, offset=True),
        W8A16.name: Int8(torch.float32, offset=True),
        W8A8Static.name: StaticInt8(),
    }
    of_experts = (BF16.name, W8A8.name)
    """vllm-ascend 0.23.0 has no W8A16 for experts (quantization/methods/w8a16.py)."""

    types: ClassVar[Mapping[str, str]] = {
        BF16.name: exchange.FLOAT,
        W8A8.name: exchange.W8A8_DYNAMIC,
        W8A16.name: exchange.W8A16,
        W8A8Static.name: exchange.W8A8_STATIC,
    }
    """The type that a description gives to the tensors of a scheme."""

    @override
    def files(self, config: Mapping[str, Any], items: Sequence[ExportItem]) -> dict[str, bytes]:
        _require_quantized(self, items)
        _refuse_large_head(items)
        types = {name: self._type(item, name) for item in items for name in item.forms}
        # A tied head has no tensor, but readers ask for its type (vllm-ascend issue 8367).
        types.setdefault(f"{LM_HEAD}.{exchange.WEIGHT}", exchange.FLOAT)
        return {
            CONFIG_NAME: indented(config),
            exchange.DESCRIPTION_NAME: indented(exchange.ascendv1_description(types)),
        }

    def _type(self, item: ExportItem, name: str) -> str:
        """The type of a tensor. ModelSlim calls the bias of any linear a float."""
        return exchange.FLOAT if name.endswith(f".{BIAS}") else self.types[item.scheme.name]


FORMATS: Mapping[str, Format] = dict(
    zip(EXPORT_FORMATS, (AscendV1(), CompressedTensors(), HuggingFace()), strict=True)
)


def format_named(name: str) -> Format:
    """The format of a name; OptionError if there is none."""
    if name not in FORMATS:
        raise OptionError(f"format: {name!r} is not known; known: {', '.join(FORMATS)}")
    return FORMATS[name]


def _refuse_large_head(items: Sequence[ExportItem]) -> None:
    """Our runtime divides a head that is too large for the operator; vllm-ascend 0.23.0 does not
    (AscendEmbeddingMethod, quantization/method_adapters.py)."""
    most = ASCEND_A2_A3.largest_dimension
    for item in items:
        if item.is_linear and item.expression.is_quantized and item.matrix[0] > most:
            raise OptionError(
                f"{item.name} is quantized and has {item.matrix[0]} outputs; vllm-ascend gives all "
                f"of them to one operator, which takes {most}: convert with a recipe that "
                f"leaves it in bf16, such as w8a8"
            )


def _one_quantized_scheme(linears: Sequence[ExportItem]) -> Scheme:
    """The scheme of all linears that are quantized; OptionError if there are several, or if a group
    of inputs is not whole, which no reader takes."""
    schemes = {item.scheme: item for item in linears if item.expression.is_quantized}
    if len(schemes) > 1:
        first, second, *_ = schemes.values()
        raise OptionError(
            f"format {CompressedTensors.name} is written for one quantized scheme, but "
            f"{first.name} has {first.scheme} and {second.name} has {second.scheme}; export as "
            f"{HuggingFace.name}, or convert the model with another recipe"
        )
    for item in linears:
        if isinstance(item.scheme, W4A16) and item.matrix[1] % item.scheme.group:
            raise OptionError(
                f"{item.name} has {item.matrix[1]} inputs, and format {CompressedTensors.name} "
                f"states whole groups of {item.scheme.group} only; convert with another group, or "
                f"export as {HuggingFace.name}"
            )
        _require_whole_words(item)
    return next(iter(schemes))


def _require_whole_words(item: ExportItem) -> None:
    """Words of zero points hold neighbouring outputs: of two parts they cannot be divided."""
    if isinstance(item.scheme, W4A16) and item.scheme.zero_points:
        for source, outputs in item.parts:
            if outputs % 8:
                raise OptionError(
                    f"{source} has {outputs} outputs, and format {CompressedTensors.name} packs "
                    f"the zero points of eight; export as {HuggingFace.name}"
                )


def _require_quantized(made: Format, items: Sequence[ExportItem]) -> None:
    if not any(item.expression.is_quantized for item in items):
        raise OptionError(
            f"nothing in this checkpoint is quantized, so {made.name} has nothing to say of it; "
            f"export as {HuggingFace.name}, which every engine loads"
        )
