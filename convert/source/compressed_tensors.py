"""The section of config.json of a compressed-tensors model: how each linear is held, or a refusal.

Source: `QuantizationConfig`, `QuantizationScheme`, `QuantizationArgs` and utils/match.py of
compressed-tensors 0.19, which llm-compressor, transformers and vLLM use.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qwen3_ascend.convert.encodings import Encoding, Int8Encoding
from qwen3_ascend.convert.exchange import (
    COMPRESSED_TENSORS,
    FLOAT_QUANTIZED,
    INT8_PER_CHANNEL,
    INT8_PER_TOKEN,
    INT_QUANTIZED,
    LINEAR,
    PACK_QUANTIZED,
    QUANTIZATION_CONFIG,
    WEIGHT_SCALE,
    WEIGHT_ZERO_POINT,
)
from qwen3_ascend.convert.fp8 import Fp8Encoding
from qwen3_ascend.convert.packed import COMPRESSED, PackedEncoding
from qwen3_ascend.convert.source.packed import decoding_notes
from qwen3_ascend.convert.source.quantization import Quantization
from qwen3_ascend.errors import ConfigError
from qwen3_ascend.files.json_file import Size, typed

ADVICE = (
    "quantize with the scheme W8A8 (int8, weights for each channel, activations for each token), "
    "FP8_DYNAMIC or FP8_BLOCK in llm-compressor, or convert the original model"
)

FORMATS = (INT_QUANTIZED, FLOAT_QUANTIZED, "naive-quantized")
"""Formats in which codes of a byte lie as they are; the last is the name of older versions."""

MIXED = "mixed-precision"
"""The format of the whole, if the groups have formats of their own."""

IS_COMPRESSED = "compressed"
"""The status of weights that are stored as codes."""

DENSE = "dense"
"""The sparsity format of weights that are not sparse."""

NO_SCHEME = "there is no scheme for it yet"

REGEX = "re:"

FLOAT8: Mapping[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
"""How FP8 weights are quantized."""


@dataclass(frozen=True)
class Blocks:
    """A QuantizationArgs of the strategy "block": rows and columns that share a scale."""

    block_structure: tuple[Size, Size]


DEFAULTS: Mapping[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
"""Of a QuantizationArgs that leaves a key out."""


@dataclass(frozen=True)
class Group:
    """One of config_groups: what is quantized alike."""

    targets: tuple[str, ...]
    weights: dict[str, Any] | None = None
    input_activations: dict[str, Any] | None = None
    output_activations: dict[str, Any] | None = None
    format: str | None = None


@dataclass(frozen=True)
class Section:
    """quantization_config, as far as it says how weights are to be read; other keys tell how they
    came about."""

    config_groups: dict[str, Group]
    format: str
    ignore: tuple[str, ...] | None = ()
    quantization_status: str | None = None
    kv_cache_scheme: dict[str, Any] | None = None
    sparsity_config: dict[str, Any] | None = field(default_factory=dict)
    transform_config: dict[str, Any] | None = field(default_factory=dict)


def read_section(config: Mapping[str, Any], linears: Collection[str], where: str) -> Quantization:
    """Which linears are quantized.

    Args:
        config: the whole config.json.
        linears: names of the model's linears.
        where: its place, for errors.

    Raises:
        ConfigError: naming the first thing that cannot be taken as it is.
    """
    place = f"{where}: {QUANTIZATION_CONFIG}"
    try:
        section = typed(config[QUANTIZATION_CONFIG], Section, place)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    _check_model(section, place)
    groups = {
        target: name for name, group in section.config_groups.items() for target in group.targets
    }
    ignore = section.ignore or ()
    _check_patterns([*groups, *ignore], place)
    encodings: dict[str, Encoding] = {}
    for linear in linears:
        target = _match(linear, groups)
        if target is not None and _match(linear, ignore) is None:
            name = groups[target]
            encodings[linear] = _group_encoding(section, name, place)
    return Quantization(COMPRESSED_TENSORS, encodings, decoding_notes(encodings.values()))


def _match(linear: str, targets: Iterable[str]) -> str | None:
    """The target that decides on a linear: its name before a pattern before its class."""
    named = [t for t in targets if t == linear]
    patterns = [t for t in targets if t.startswith(REGEX) and re.match(t[len(REGEX) :], linear)]
    classes = [t for t in targets if t == LINEAR]
    return next(iter([*named, *sorted(patterns), *classes]), None)


def _check_patterns(targets: Iterable[str], place: str) -> None:
    for target in targets:
        if target.startswith(REGEX):
            try:
                re.compile(target[len(REGEX) :])
            except re.error as error:
                raise ConfigError(f"{place}: {target!r} is no pattern: {error}") from error


def _check_model(section: Section, place: str) -> None:
    """Refuses what concerns the model as a whole."""
    refused = {
        "kv_cache_scheme": section.kv_cache_scheme,
        "transform_config": section.transform_config,
        "sparsity_config": _sparsity(section),
    }
    for key, value in refused.items():
        if value:
            raise ConfigError(f"{place}: {key} is set, which is not supported; {ADVICE}")
    if section.quantization_status not in (None, IS_COMPRESSED):
        raise ConfigError(
            f"{place}: quantization_status is {section.quantization_status!r} and not "
            f"{IS_COMPRESSED!r}: the model was not saved to be read; save it compressed"
        )
    if section.format not in (*FORMATS, PACK_QUANTIZED, MIXED):
        raise ConfigError(_no_format(place, section.format))


def _sparsity(section: Section) -> dict[str, Any] | None:
    """What is said of sparsity, unless it is that there is none."""
    said = section.sparsity_config
    return None if said and said.get("format") == DENSE else said


def _group_encoding(section: Section, name: str, model: str) -> Encoding:
    """How the linears of a group are held; refuses what can neither be taken nor decoded."""
    group, place = section.config_groups[name], f"{model}: {name}"
    if group.format not in (None, *FORMATS, PACK_QUANTIZED):
        raise ConfigError(_no_format(place, group.format))
    if group.output_activations:
        raise ConfigError(f"{place}: output_activations are quantized; {NO_SCHEME}; {ADVICE}")
    form, is_float = group.format or section.format, (group.weights or {}).get("type") == "float"
    if form == PACK_QUANTIZED:
        return _packed_encoding(group, place, model)
    if is_float and form != INT_QUANTIZED:
        return _float8_encoding(group, place, model)
    _check_arguments(group.weights, INT8_PER_CHANNEL, f"{place}: weights")
    _check_arguments(group.input_activations, INT8_PER_TOKEN, f"{place}: input_activations")
    return Int8Encoding(model, WEIGHT_ZERO_POINT)


def _float8_encoding(group: Group, place: str, model: str) -> Encoding:
    """Float8 weights. What is to become of the activations does not matter to them, as long as it
    needs no tensors of its own."""
    said = group.weights or {}
    _check_arguments(said, FLOAT8, f"{place}: weights")
    _check_dynamic(group, place)
    strategy = str(said.get("strategy")).lower()
    if strategy == "tensor":
        return Fp8Encoding(model, WEIGHT_SCALE, None, None)
    if strategy == "channel":
        return Fp8Encoding(model, WEIGHT_SCALE, 1, None)
    if strategy != "block":
        raise ConfigError(f"{place}: weights: strategy is {strategy!r}; {NO_SCHEME}; {ADVICE}")
    try:
        block = typed(said, Blocks, f"{place}: weights").block_structure
    except ValueError as error:
        raise ConfigError(f"{error}; {NO_SCHEME}; {ADVICE}") from error
    return Fp8Encoding(model, WEIGHT_SCALE, *block)


def _packed_encoding(group: Group, place: str, model: str) -> Encoding:
    """Packed integers; as for floats, activations do not matter to them."""
    said = group.weights or {}
    _check_arguments(said, {"type": "int", "dynamic": False}, f"{place}: weights")
    _check_dynamic(group, place)
    bits, strategy = said.get("num_bits", DEFAULTS["num_bits"]), str(said.get("strategy")).lower()
    size = None if strategy == "channel" else said.get("group_size")
    grouped = isinstance(size, int) and size > 0 if strategy == "group" else strategy == "channel"
    if bits not in (4, 8) or not grouped:
        raise ConfigError(
            f"{place}: weights: num_bits {bits}, strategy {strategy!r}, group_size {size}: "
            f"{NO_SCHEME}; {ADVICE}"
        )
    encoding = PackedEncoding(
        model, COMPRESSED_TENSORS, COMPRESSED, bits, size,
        symmetric=said.get("symmetric", DEFAULTS["symmetric"]) is True,
        ordered=said.get("actorder") in ("group", True),
    )  # fmt: skip
    return encoding.taken()


def _check_dynamic(group: Group, place: str) -> None:
    """Refuses activations that need tensors of their own."""
    if group.input_activations is not None:
        _check_arguments(group.input_activations, {"dynamic": True}, f"{place}: input_activations")


def _check_arguments(said: Mapping[str, Any] | None, wanted: Mapping[str, Any], place: str) -> None:
    if said is None:
        raise ConfigError(f"{place} are not quantized; {NO_SCHEME}; {ADVICE}")
    for key, value in wanted.items():
        found = said.get(key, DEFAULTS.get(key))
        if key == "strategy" and found is None and said.get("group_size") == -1:
            found = "channel"
        found = found.lower() if isinstance(found, str) else found
        if found != value or isinstance(found, bool) != isinstance(value, bool):
            raise ConfigError(
                f"{place}: {key} is {found!r} and not {value!r}; {NO_SCHEME}; {ADVICE}"
            )


def _no_format(place: str, found: str | None) -> str:
    return f"{place}: format is {found!r} and not {INT_QUANTIZED!r}; {NO_SCHEME}; {ADVICE}"
