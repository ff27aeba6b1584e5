"""The description of a model that ModelSlim has quantized: a type for each tensor, or a refusal.

Source: the writers of msmodelslim 26.1.0 (core/quant_service/modelslim_v1/save/ascendv1.py, and
the older one in pytorch/llm_ptq). The types of the tensors decide; `model_quant_type` does not
tell what a mixed model holds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from qwen3_ascend.checkpoint.architecture import LM_HEAD
from qwen3_ascend.checkpoint.companions import CONFIG_NAME
from qwen3_ascend.checkpoint.linear import BIAS
from qwen3_ascend.convert.encodings import Int8Encoding
from qwen3_ascend.convert.exchange import (
    ASCENDV1,
    ASCENDV1_STEMS,
    DESCRIPTION_GLOBALS,
    DESCRIPTION_NAMES,
    FLOAT,
    HUGGINGFACE_WEIGHTS,
    INDEX_SUFFIX,
    QUANTIZATION_CONFIG,
    TOTAL_TYPE,
    W8A8_DYNAMIC,
    WEIGHT,
    WEIGHT_OFFSET,
    WEIGHT_SCALE,
    WeightNames,
)
from qwen3_ascend.convert.source.quantization import Quantization
from qwen3_ascend.errors import SourceError

ASCEND = "ascend"
"""The quant_method by which engines for Ascend know the format where config.json names one."""

ADVICE = (
    "quantize with W8A8_DYNAMIC (int8, a scale for each token) in ModelSlim, or convert the "
    "original model"
)

TYPES: Mapping[str, str] = {
    "W8A8": "int8 activations under scales that calibration has fixed",
    "W8A8_MIX": "int8 activations under fixed scales for prompts, and found ones for decoding",
    "W8A16": "int8 weights for float activations",
    "W8A8S": "sparse int8 weights",
    "W8A8SC": "sparse, compressed int8 weights",
    "C8": "an int8 key/value cache",
    "FAQuant": "quantized attention",
}
"""What some types mean that no scheme here has; source: the documentation of AscendV1."""

KEYS: Mapping[str, str] = {
    "kv_cache_type": "a quantized key/value cache, which is not supported",
    "kv_quant_type": "a quantized key/value cache, which is not supported",
    "fa_quant_type": "quantized attention, which is not supported",
    "indexer_quant_type": "quantized attention, which is not supported",
    "reduce_quant_type": "quantized messages between ranks, which are not supported",
}
"""What keys say that name no tensor and change what is computed."""

NORM_BIAS = (
    "an asymmetric anti-outlier method that gave the norms a bias, which no Qwen3 has (a symmetric "
    "one does not)"
)
BEFORE = "an anti-outlier method that divides activations before a linear, which no Qwen3 does"

NAME_PARTS: Mapping[str, str] = {
    "norm.bias": NORM_BIAS,
    "norm.module.": NORM_BIAS,
    ".div.": BEFORE,
    ".linear.": BEFORE,
    ".kv_cache_": "a quantized key/value cache, which is not supported",
    "heads_rotation": "rotations at run time, which no Qwen3 has",
    "kronecker_rotation": "rotations at run time, which no Qwen3 has",
}
"""What a part of a tensor's name tells that is no part of a Qwen3, whatever its type."""

NOTHING: tuple[Any, ...] = (None, False, "", 0, [], {})
"""Values of a key that say nothing."""


def description_file(names: Collection[str], place: str) -> str | None:
    """Which of a folder's files is the description; None if there is none.

    Raises:
        SourceError: if there are several.
    """
    return _only([name for name in names if DESCRIPTION_NAMES.fullmatch(name)], place)


def weight_names(names: Collection[str], place: str) -> WeightNames:
    """How a folder's weight files are named: as ModelSlim does, in any version, or transformers.

    Raises:
        SourceError: if there are files of several models.
    """
    for end in (INDEX_SUFFIX, ".safetensors"):
        stems = [name.removesuffix(end) for name in names if name.endswith(end)]
        if stem := _only([stem for stem in stems if ASCENDV1_STEMS.fullmatch(stem)], place):
            return WeightNames(stem)
    return HUGGINGFACE_WEIGHTS


def ascend_section(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a config.json says beside the description, which it repeats or points to, as engines
    for Ascend have asked for it; None if nothing."""
    said = config.get(QUANTIZATION_CONFIG)
    known = isinstance(said, dict) and (said.get("quant_method") == ASCEND or TOTAL_TYPE in said)
    return said if known else None


def read_description(
    data: Mapping[str, Any], section: Mapping[str, Any], linears: Collection[str], where: str
) -> Quantization:
    """Which linears ModelSlim has quantized.

    Args:
        data: the JSON object.
        section: what config.json says beside it.
        linears: names of the model's linears.
        where: its place, for errors.

    Raises:
        SourceError: naming the first thing that cannot be taken as it is.
    """
    for key, value in data.items():
        if key not in DESCRIPTION_GLOBALS:
            _check_entry(key, value, linears, where)
    for key in KEYS:
        _check_entry(key, section.get(key), linears, f"{CONFIG_NAME}: {QUANTIZATION_CONFIG}")
    metadata = data.get("metadata")
    if isinstance(metadata, dict) and metadata.get("quarot"):
        raise SourceError(f"{where}: metadata: quarot: {NAME_PARTS['heads_rotation']}; {ADVICE}")
    types = {linear: data.get(f"{linear}.{WEIGHT}") for linear in linears}
    for linear, kind in types.items():
        if kind is None and linear != LM_HEAD:  # a tied one is left out by some
            raise SourceError(f"{where} says nothing of {linear}.{WEIGHT}; it is of another model")
    taken = [linear for linear, kind in types.items() if kind == W8A8_DYNAMIC]
    return Quantization(ASCENDV1, dict.fromkeys(taken, Int8Encoding(where, WEIGHT_OFFSET)))


def name_meaning(tensor: str) -> str | None:
    """What a tensor's name tells that no Qwen3 has; None if nothing."""
    return next((NAME_PARTS[part] for part in NAME_PARTS if part in tensor), None)


def _check_entry(key: str, value: object, linears: Collection[str], where: str) -> None:
    """Refuses an entry that says of a tensor, or of the model, what no scheme here has."""
    if value in NOTHING:
        return
    linear, _, suffix = key.rpartition(".")
    ours = suffix in (WEIGHT, WEIGHT_SCALE, WEIGHT_OFFSET, BIAS) and linear in linears
    if ours and value in (FLOAT, W8A8_DYNAMIC):
        return
    meaning = KEYS.get(key) or name_meaning(key)
    if value == FLOAT and meaning is None:
        return
    if meaning is None:
        known = f"{TYPES[value]}; " if isinstance(value, str) and value in TYPES else ""
        meaning = f"{known}there is no scheme for it yet"
    raise SourceError(f"{where}: {key} is {_short(value)}: {meaning}; {ADVICE}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _only(found: list[str], place: str) -> str | None:
    if len(found) > 1:
        first, second = sorted(found)[:2]
        raise SourceError(
            f"{place} holds {first} and {second}, which are of two quantized models: remove the "
            f"one that is not meant"
        )
    return found[0] if found else None
