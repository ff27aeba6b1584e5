"""The names of the formats in which quantized models are exchanged; nothing else spells them.

*AscendV1* is what ModelSlim (msmodelslim) writes and vllm-ascend, SGLang and MindIE read: plain
tensors beside a description that gives a type to each of them. Source: ascendv1.py of msmodelslim
26.1.0 and the files that it writes.

*compressed-tensors* is what llm-compressor writes and vLLM, vllm-ascend, SGLang and transformers
read: plain tensors, and a section of config.json that tells which linears are quantized, and how.
Source: `QuantizationConfig` and the int-quantized compressor of the compressed-tensors package.

Both name tensors as transformers does and fuse nothing: a linear such as
"model.layers.0.self_attn.q_proj" has the tensors "<linear>.weight", "<linear>.weight_scale", ...
For int8 both state the same arithmetic as our scheme w8a8: weight = code * scale of its output,
activations int8 with a scale for each token. So nothing but the type of the scale changes.

*fp8* is the format of the models that Qwen and DeepSeek publish as FP8: float8_e4m3fn weights with
a scale for each block of them. Source: `FineGrainedFP8Config` and integrations/finegrained_fp8.py
of transformers 5.24.

*gptq* and *awq* are what AutoGPTQ, gptqmodel and AutoAWQ write: integers that are packed into int32
words. See convert/packed.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from qwen3_ascend.checkpoint.schemes.base import Codes
from qwen3_ascend.files.safetensors import Form

WEIGHT = "weight"
"""Suffix of a linear's weight: int8 codes [N, K], or floats [N, K]."""

WEIGHT_SCALE = "weight_scale"
"""Suffix of its scales, [N, 1]: float32 in AscendV1; in compressed-tensors float32 or bfloat16. One
axis less is refused by vLLM and vllm-ascend."""

WEIGHT_OFFSET = "weight_offset"
"""Suffix of its offsets, float32 [N, 1], in AscendV1: zero for symmetric weights."""

INDEX_SUFFIX = ".safetensors.index.json"


@dataclass(frozen=True)
class WeightNames:
    """How a format names its weight files.

    Attributes:
        stem: of every file: stem-00001-of-00002.safetensors.
    """

    stem: str

    @property
    def single(self) -> str:
        """Name of the weight file of a model that has only one, without an index."""
        return f"{self.stem}.safetensors"

    @property
    def index(self) -> str:
        """Name of the JSON file whose weight_map gives the file of every tensor."""
        return f"{self.stem}{INDEX_SUFFIX}"


# AscendV1

ASCENDV1 = "ascendv1"
"""The format's name, as options and the manifest have it."""

DESCRIPTION_NAME = "quant_model_description.json"
"""The file by which every reader of AscendV1 knows the format."""

DESCRIPTION_NAMES = re.compile(r"quant_model_description(_\w+)?\.json")
"""What older versions of ModelSlim call it as well: quant_model_description_w8a8_dynamic.json."""

ASCENDV1_WEIGHTS = WeightNames("quant_model_weights")

ASCENDV1_STEMS = re.compile(r"quant_model_weights?(_\w+)?")
"""Stems of older versions as well: quant_model_weight, quant_model_weight_w8a8_dynamic."""

FLOAT = "FLOAT"
"""Type of a tensor that is not quantized."""

W8A8_DYNAMIC = "W8A8_DYNAMIC"
"""Type of every tensor of a linear with int8 weights, a scale for each output, and int8 activations
with a scale for each token: our w8a8."""

W8A16 = "W8A16"
"""The same with activations as they are: our w8a16."""

W8A8_STATIC = "W8A8"
"""Type of every tensor of a linear with int8 weights, a scale for each output, and int8 activations
under one scale and offset: our w8a8-static. Source: on_w8a8_static in ascendv1.py of msmodelslim
26.1.0, and AscendW8A8LinearMethod of vllm-ascend 0.23.0, which reads them."""

INPUT_SCALE, INPUT_OFFSET = "input_scale", "input_offset"
"""Suffixes of the scale and offset of its inputs, float32 [1] each."""

DEQ_SCALE, QUANT_BIAS = "deq_scale", "quant_bias"
"""Suffixes of what its integer sums are multiplied by, float32 [N], and what is added to them
before, int32 [N]: the offset's part, and the bias in units of deq_scale."""

ASCENDV1_VERSION = "1.0.0"

TOTAL_TYPE = "model_quant_type"

DESCRIPTION_GLOBALS = ("version", TOTAL_TYPE, "metadata", "group_size", "optional")
"""Keys of a description that name no tensor."""


def ascendv1_description(types: Mapping[str, str]) -> dict[str, Any]:
    """The description of a model: the type of each tensor by its name, then the rest."""
    quantized = [kind for kind in types.values() if kind != FLOAT]
    total = quantized[0] if quantized else FLOAT
    values: tuple[Any, ...] = (ASCENDV1_VERSION, total, {}, 0, {})
    return {**types, **dict(zip(DESCRIPTION_GLOBALS, values, strict=True))}


# compressed-tensors

WEIGHT_ZERO_POINT = "weight_zero_point"
"""Suffix of what takes the place of offsets, int8 [N, 1]; only of weights that are asymmetric."""

QUANTIZATION_CONFIG = "quantization_config"
"""Key of config.json that holds what follows."""

COMPRESSED_TENSORS = "compressed-tensors"
"""Its quant_method; and the format's name, as options and the manifest have it."""

INT_QUANTIZED = "int-quantized"
"""Its format for int8 codes that are stored as int8."""

FLOAT_QUANTIZED = "float-quantized"
"""Its format for float8 codes."""

PACK_QUANTIZED = "pack-quantized"
"""Its format for weights alone: codes of 4 or 8 bits along the inputs, in int32."""

WEIGHT_PACKED, WEIGHT_SHAPE = "weight_packed", "weight_shape"
"""Suffixes of such codes, and of the shape (N, K), int64 [2]. Zero points are packed as well, but
along the outputs."""

LINEAR = "Linear"
"""The class of modules that stands for every linear but the output projection."""

HUGGINGFACE_WEIGHTS = WeightNames("model")
"""Weight files of compressed-tensors, and of any model of transformers."""

INT8_PER_CHANNEL: Mapping[str, Any] = MappingProxyType(
    {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
)
"""How w8a8 weights are quantized."""

INT8_PER_TOKEN: Mapping[str, Any] = MappingProxyType(
    {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
)
"""How its activations are."""


INT8_DYNAMIC: Mapping[str, Any] = MappingProxyType(
    {
        "weights": INT8_PER_CHANNEL,
        "input_activations": INT8_PER_TOKEN,
        "output_activations": None,
        "format": INT_QUANTIZED,
    }
)
"""What a group of linears of w8a8 is told by."""


def weights_alone(bits: int, group: int | None, zero_points: bool = False) -> dict[str, Any]:
    """What a group of linears is told by whose weights alone have so many bits, with a scale (and
    perhaps a zero point) for each output (None) or for each group of its inputs."""
    said = {"num_bits": bits, "strategy": "channel" if group is None else "group"}
    if group is not None:
        said["group_size"] = group
    if zero_points:
        said |= {"symmetric": False, "zp_dtype": "torch.int8"}
    return {
        "weights": {**INT8_PER_CHANNEL, **said},
        "input_activations": None,
        "output_activations": None,
        "format": PACK_QUANTIZED,
    }


def compressed_tensors_config(
    targets: Sequence[str], ignore: Sequence[str], quantization: Mapping[str, Any]
) -> dict[str, Any]:
    """The section of config.json for a model whose quantized linears are all of one kind.

    Args:
        targets: classes of modules, or names of linears, that are quantized. vLLM's output
            projection is no Linear, and has to be named.
        ignore: names of the linears that are not quantized. "lm_head" belongs there also when it
            is tied to the embedding: readers make a linear of it.
        quantization: INT8_DYNAMIC, or what `weights_alone` says.
    """
    group = {key: _plain(value) for key, value in quantization.items()}
    return {
        "quant_method": COMPRESSED_TENSORS,
        "format": quantization["format"],
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "config_groups": {"group_0": {"targets": list(targets), **group}},
        "ignore": list(ignore),
    }


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def packed_forms(
    shape: Sequence[int], bits: int, group: int | None, zero_points: bool = False
) -> dict[str, Form]:
    """The tensors of a pack-quantized linear [N, K] by suffix, but for its shape."""
    outputs, inputs = shape
    groups = 1 if group is None else inputs // group
    forms = {
        WEIGHT_PACKED: Form(torch.int32, (outputs, -(-inputs * bits // 32))),
        WEIGHT_SCALE: Form(torch.bfloat16, (outputs, groups)),
    }
    if zero_points:
        forms[WEIGHT_ZERO_POINT] = Form(torch.int32, (-(-outputs * bits // 32), groups))
    return forms


def packed_tensors(codes: Codes, bits: int) -> dict[str, Tensor]:
    """Those tensors of codes of w8a16 or w4a16.

    Raises:
        ValueError: if a zero point does not fit into so many bits.
    """
    scale = codes["scale"]  # [N], or [G, N]
    tensors = {
        WEIGHT_PACKED: _packed_rows(codes["weight"], bits),
        WEIGHT_SCALE: (scale[:, None] if scale.dim() == 1 else scale.t()).contiguous(),
    }
    if "offset" in codes:
        zeros = codes["offset"].neg().to(torch.int8)  # [G, N]
        if bool((zeros >= 1 << (bits - 1)).any()):
            raise ValueError(f"a zero point is {1 << bits}, which {bits} bits do not hold")
        tensors[WEIGHT_ZERO_POINT] = _packed_rows(zeros, bits).t().contiguous()
    return tensors


def _packed_rows(codes: Tensor, bits: int) -> Tensor:
    """int8 [R, C] as int32 words along the rows. A code is stored as what it lies above the least
    one, the first in the lowest bits of a word."""
    least = 1 << (bits - 1)
    fields = (codes.view(torch.uint8) ^ least) & ((1 << bits) - 1)
    fields = torch.nn.functional.pad(fields, (0, -fields.shape[-1] % (32 // bits)))
    if bits < 8:
        fields = fields[:, 0::2] | fields[:, 1::2] << bits
    return fields.flatten().view(torch.int32).view(fields.shape[0], -1)


# fp8

FP8 = "fp8"
"""Its quant_method; and the format's name, as the manifest has it."""

WEIGHT_SCALE_INV = "weight_scale_inv"
"""Suffix of the scales, [ceil(N / rows of a block), ceil(K / columns of a block)] in float32 or
bfloat16. A weight is its code times its scale, whatever the name says."""

FP8_TYPE = torch.float8_e4m3fn
"""Type of the codes [N, K]; it has no infinity, and 0x7F and 0xFF are NaN."""


# GPTQ and AWQ

GPTQ = "gptq"
"""Its quant_method; and the format's name, as the manifest has it."""

AWQ = "awq"
"""The same of AWQ."""


# Int8, of both


def int8_forms(shape: Sequence[int], scale: torch.dtype, offset: bool = False) -> dict[str, Form]:
    """The tensors of an int8 linear [N, K] by suffix: codes, scales and perhaps offsets."""
    column = (shape[0], 1)
    forms = {WEIGHT: Form(torch.int8, tuple(shape)), WEIGHT_SCALE: Form(scale, column)}
    return {**forms, WEIGHT_OFFSET: Form(torch.float32, column)} if offset else forms


def int8_tensors(codes: Codes, scale: torch.dtype, offset: bool = False) -> dict[str, Tensor]:
    """Those tensors of codes of w8a8. Scales that were chosen here are bfloat16-exact: no type
    loses anything. Those that were taken from a source have to be stated in float32."""
    column = codes["scale"][:, None].to(scale)
    tensors = {WEIGHT: codes["weight"], WEIGHT_SCALE: column}
    return {**tensors, WEIGHT_OFFSET: torch.zeros_like(column)} if offset else tensors


def int8_codes(tensors: Mapping[str, Tensor]) -> Codes:
    """The inverse: codes of w8a8, int8 [N, K] and float32 [N], of symmetric int8 tensors."""
    return {"weight": tensors[WEIGHT], "scale": tensors[WEIGHT_SCALE].reshape(-1).float()}
