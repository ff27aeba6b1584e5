"""The section of config.json of an FP8 model, as Qwen and DeepSeek publish them.

Which linears are FP8 is told by the tensors: engines read the names of what was left out in
different ways (transformers as patterns, vLLM as names).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from qwen3_ascend.convert.exchange import (
    FP8,
    FP8_TYPE,
    QUANTIZATION_CONFIG,
    WEIGHT,
    WEIGHT_SCALE_INV,
)
from qwen3_ascend.convert.fp8 import Fp8Encoding
from qwen3_ascend.convert.source.quantization import Quantization
from qwen3_ascend.errors import ConfigError
from qwen3_ascend.files.json_file import Size, typed
from qwen3_ascend.files.safetensors import TensorSlot

ADVICE = "convert the original model"


@dataclass(frozen=True)
class Section:
    """quantization_config, as far as it says how weights are to be read."""

    weight_block_size: tuple[Size, Size]
    activation_scheme: str = "dynamic"
    fmt: str = "e4m3"
    scale_fmt: str = "float"


def read_section(
    config: Mapping[str, Any],
    linears: Collection[str],
    slots: Mapping[str, TensorSlot],
    where: str,
) -> Quantization:
    """Which linears are FP8.

    Args:
        config: the whole config.json.
        linears: names of the model's linears.
        slots: type and shape of every tensor of the source.
        where: its place, for errors.

    Raises:
        ConfigError: naming the first thing that cannot be decoded.
    """
    place = f"{where}: {QUANTIZATION_CONFIG}"
    try:
        section = typed(config[QUANTIZATION_CONFIG], Section, place)
    except ValueError as error:
        raise ConfigError(f"{error}; {ADVICE}") from error
    for key, known in (("activation_scheme", "dynamic"), ("fmt", "e4m3"), ("scale_fmt", "float")):
        if (found := getattr(section, key)) != known:
            raise ConfigError(f"{place}: {key} is {found!r} and not {known!r}; {ADVICE}")
    encoding = Fp8Encoding(place, WEIGHT_SCALE_INV, *section.weight_block_size)
    coded = [linear for linear in linears if _is_coded(linear, slots)]
    return Quantization(FP8, dict.fromkeys(coded, encoding))


def _is_coded(linear: str, slots: Mapping[str, TensorSlot]) -> bool:
    weight = slots.get(f"{linear}.{WEIGHT}")
    codes = weight is not None and weight.dtype == FP8_TYPE
    return codes or f"{linear}.{WEIGHT_SCALE_INV}" in slots
