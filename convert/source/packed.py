"""The section of config.json of a GPTQ or AWQ model.

Which linears are packed is told by the tensors. Sources: `QuantizeConfig` of gptqmodel 7.7,
`BaseQuantizeConfig` of AutoGPTQ, `AwqConfig` of AutoAWQ 0.2; auto-round 0.15 writes both.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qwen3_ascend.convert import packed
from qwen3_ascend.convert.encodings import Encoding
from qwen3_ascend.convert.exchange import AWQ, GPTQ, QUANTIZATION_CONFIG
from qwen3_ascend.convert.packed import PackedEncoding
from qwen3_ascend.convert.source.quantization import Quantization, quant_method
from qwen3_ascend.errors import ConfigError
from qwen3_ascend.files.json_file import typed
from qwen3_ascend.files.safetensors import TensorSlot

ADVICE = "convert the original model"

ALL_INPUTS = -1
"""The group size of an output with one scale."""

LEAVES_OUT = "-:"
"""What a pattern of gptqmodel's `dynamic` begins with that leaves linears as they are."""


@dataclass(frozen=True)
class GptqSection:
    """quantization_config of GPTQ, as far as it says how weights are to be read."""

    bits: Literal[4, 8]
    group_size: int
    desc_act: bool = False
    sym: bool = True
    checkpoint_format: Literal["gptq", "gptq_v2"] | None = "gptq"
    dynamic: dict[str, Any] | None = field(default_factory=dict)


@dataclass(frozen=True)
class AwqSection:
    """quantization_config of AWQ, likewise."""

    bits: Literal[4]
    group_size: int
    zero_point: bool = True
    version: Literal["gemm", "GEMM"] = "gemm"


def read_section(
    config: Mapping[str, Any],
    linears: Collection[str],
    slots: Mapping[str, TensorSlot],
    where: str,
) -> Quantization:
    """Which linears are packed, and whether their integers can be taken.

    Args:
        config: the whole config.json, of GPTQ or AWQ.
        linears: names of the model's linears.
        slots: type and shape of every tensor of the source.
        where: its place, for errors.

    Raises:
        ConfigError: naming the first thing that can neither be taken nor decoded.
    """
    place, said = f"{where}: {QUANTIZATION_CONFIG}", config[QUANTIZATION_CONFIG]
    method = quant_method(config)
    read = _gptq if method == GPTQ else _awq
    try:
        encoding = read(said, place).taken()
    except ValueError as error:
        raise ConfigError(f"{error}; {ADVICE}") from error
    held = [n for n in linears if f"{n}.{encoding.packing.weight}" in slots]
    encodings = dict.fromkeys(held, encoding)
    return Quantization(method, encodings, decoding_notes(encodings.values()))


def decoding_notes(encodings: Iterable[Encoding]) -> tuple[str, ...]:
    """Why packed integers are not taken, or what becomes of their scales, for people."""
    found = dict.fromkeys(e for e in encodings if isinstance(e, PackedEncoding))
    return tuple(
        f"the integers of {encoding.format} are decoded: {why}"
        for encoding in found
        if (why := encoding.why_decoded)
    )


def _gptq(said: object, place: str) -> PackedEncoding:
    section = typed(said, GptqSection, place)
    for pattern in section.dynamic or {}:
        if not pattern.startswith(LEAVES_OUT):
            raise ValueError(f"{place}: dynamic: {pattern!r} has settings of its own")
    packing = packed.GPTQ_V2 if section.checkpoint_format == "gptq_v2" else packed.GPTQ
    return PackedEncoding(
        place, GPTQ, packing, section.bits, _group(section.group_size, place), section.sym,
        section.desc_act,
    )  # fmt: skip


def _awq(said: object, place: str) -> PackedEncoding:
    section = typed(said, AwqSection, place)
    group = _group(section.group_size, place)
    return PackedEncoding(
        place, AWQ, packed.AWQ, section.bits, group, not section.zero_point, ordered=False
    )


def _group(size: int, place: str) -> int | None:
    if size == ALL_INPUTS:
        return None
    if size < 1:
        raise ValueError(f"{place}: group_size is {size}")
    return size
