"""In which format a source holds its weights: as transformers saves a model, or quantized already.

A format names the weight files, says which keys of config.json are its own, and reads what it says
of the linears.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from qwen3_ascend.convert.exchange import (
    AWQ,
    COMPRESSED_TENSORS,
    FP8,
    GPTQ,
    HUGGINGFACE_WEIGHTS,
    QUANTIZATION_CONFIG,
    WeightNames,
)
from qwen3_ascend.convert.source import compressed_tensors, fp8, packed
from qwen3_ascend.convert.source.ascendv1 import (
    ascend_section,
    description_file,
    read_description,
    weight_names,
)
from qwen3_ascend.convert.source.provider import Provider
from qwen3_ascend.convert.source.quantization import NOT_QUANTIZED, Quantization, quant_method
from qwen3_ascend.errors import SourceError
from qwen3_ascend.files.json_file import indented, read_json_object
from qwen3_ascend.files.safetensors import TensorSlot

BY_TENSORS = {FP8: fp8, GPTQ: packed, AWQ: packed}
"""Who reads the formats whose quantized linears are told by their tensors."""

Read = Callable[[Collection[str], Mapping[str, TensorSlot]], Quantization]


@dataclass(frozen=True)
class SourceFormat:
    """How a source is to be read.

    Attributes:
        keys: of config.json that say how weights are quantized. They are not carried over: what
            they say is not true of what is made.
        weights: the names of the weight files.
        read: which linears are quantized, of those that are named, given type and shape of every
            tensor; raises what the format's reader does.
    """

    keys: tuple[str, ...] = ()
    weights: WeightNames = HUGGINGFACE_WEIGHTS
    read: Read = lambda linears, slots: NOT_QUANTIZED

    def plain_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A config.json without what is the format's own."""
        return {key: value for key, value in config.items() if key not in self.keys}

    def carried_config(self, data: bytes) -> bytes:
        """The bytes of config.json as they are carried over."""
        config = json.loads(data)
        if not any(key in config for key in self.keys):
            return data
        return indented(self.plain_config(config))


def recognise(
    provider: Provider, names: Collection[str], config: Mapping[str, Any], where: str, place: str
) -> SourceFormat:
    """The format of a source.

    Args:
        provider: of its files.
        names: of its files.
        config: its config.json.
        where: the place of that file, for errors.
        place: of the source, for errors.

    Raises:
        SourceError: if it tells of two quantized models.
    """
    description = description_file(names, place)
    method = quant_method(config)
    if description is not None and method == COMPRESSED_TENSORS:
        raise SourceError(
            f"{place} holds {description} of ModelSlim, and its config.json is of "
            f"compressed-tensors: remove the one that is not meant"
        )
    if description is not None:
        said = ascend_section(config)
        keys = ("quantize",) if said is None else ("quantize", QUANTIZATION_CONFIG)

        def described(linears: Collection[str], _: Mapping[str, TensorSlot]) -> Quantization:
            path = provider.small_file(description)
            return read_description(read_json_object(path), said or {}, linears, str(path))

        return SourceFormat(keys, weight_names(names, place), described)
    if method == COMPRESSED_TENSORS:
        return SourceFormat(
            (QUANTIZATION_CONFIG,),
            read=lambda linears, _: compressed_tensors.read_section(config, linears, where),
        )
    if method in BY_TENSORS:
        by_tensors = BY_TENSORS[method]
        return SourceFormat(
            (QUANTIZATION_CONFIG,),
            read=lambda linears, slots: by_tensors.read_section(config, linears, slots, where),
        )
    return SourceFormat()
