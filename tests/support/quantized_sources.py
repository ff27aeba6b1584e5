"""Sources that are quantized already, in the formats of other tools, written without ours.

The names and the arithmetic are spelled out here a second time on purpose. Scales are the largest
magnitude over 127.5, as llm-compressor chooses them: codes reach -128, and in float32 the scales
are no bfloat16 values.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from support import tiny_models

DATA = Path(__file__).parents[1] / "data" / "quantized"
"""Checkpoints that ModelSlim and llm-compressor have written; see the README there."""

REAL = ("modelslim", "modelslim-float32", "llm-compressor")

DESCRIPTION = "quant_model_description.json"
GLOBALS = {
    "version": "1.0.0", "model_quant_type": "W8A8_DYNAMIC", "metadata": {}, "group_size": 0,
    "optional": {},
}  # fmt: skip
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

WEIGHTS = {
    "num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False,
    "group_size": None, "actorder": None, "observer": "minmax", "observer_kwargs": {},
}  # fmt: skip
ACTIVATIONS = {**WEIGHTS, "strategy": "token", "dynamic": True, "observer": None}


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes [N, K] and float32 scales [N, 1] of a float weight."""
    values = weight.float()
    scale = values.abs().amax(1, keepdim=True) / 127.5
    return torch.round(values / scale).clamp(-128, 127).to(torch.int8), scale


def is_linear(name: str) -> bool:
    """Whether a tensor is the weight of a linear of a decoder layer."""
    return name.endswith(".weight") and name.split(".")[-2] in LINEARS


def int8_weights(weights: Mapping[str, Tensor], floats: Collection[str] = ()) -> dict[str, Tensor]:
    """Every linear but `floats` (and the output projection) as codes and scales."""
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if not is_linear(name) or name.removesuffix(".weight") in floats:
            found[name] = tensor
        else:
            found[name], found[f"{name}_scale"] = quantize(tensor)
    return found


def types_of(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """The type of each tensor as ModelSlim describes it."""
    linears = {name.removesuffix("_scale") for name in weights if name.endswith("_scale")}
    return {
        name: "W8A8_DYNAMIC" if name.removesuffix("_scale").removesuffix("_offset") in linears
        else "FLOAT"
        for name in weights
    }  # fmt: skip


def write_ascendv1(
    folder: Path,
    data: Mapping[str, Any] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    *,
    floats: Collection[str] = (),
    describe: Mapping[str, object] | None = None,
    file: str = "quant_model_weights-00001-of-00001.safetensors",
    index: str | None = "quant_model_weights.safetensors.index.json",
    description: str = DESCRIPTION,
    tokenizer: bool = True,
) -> Path:
    """A model as ModelSlim saves it.

    Args:
        folder: to be made.
        data: config.json.
        weights: codes and scales; default those of a tiny model.
        floats: linears that are left as they are.
        describe: further entries of the description, or others for some.
        file, index, description: the files' names.
        tokenizer: whether to add one.
    """
    data = tiny_models.config() if data is None else data
    weights = int8_weights(tiny_models.tensors(data), floats) if weights is None else dict(weights)
    scales = {name: tensor for name, tensor in weights.items() if name.endswith(".weight_scale")}
    for name, scale in scales.items():
        offset = name.removesuffix("_scale") + "_offset"
        weights.setdefault(offset, torch.zeros_like(scale))
    _write_folder(folder, data, tokenizer)
    save_file(weights, folder / file)
    if index is not None:
        (folder / index).write_text(json.dumps({"weight_map": dict.fromkeys(weights, file)}))
    said = {**types_of(weights), **GLOBALS, **(describe or {})}
    (folder / description).write_text(json.dumps(said))
    return folder


def section(
    weights: Mapping[str, Any] | None = None,
    activations: Mapping[str, Any] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """quantization_config of a model whose decoder layers are int8, with changes."""
    group = {
        "targets": ["Linear"], "weights": {**WEIGHTS, **(weights or {})},
        "input_activations": {**ACTIVATIONS, **(activations or {})}, "output_activations": None,
        "format": "int-quantized",
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": "int-quantized",
        "quantization_status": "compressed", "config_groups": {"group_0": group},
        "ignore": ["lm_head"], "kv_cache_scheme": None, "sparsity_config": {},
        "transform_config": {}, "global_compression_ratio": None, "version": "0.19.0", **changes,
    }  # fmt: skip


def write_compressed_tensors(
    folder: Path,
    data: Mapping[str, Any] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    *,
    floats: Collection[str] = (),
    said: Mapping[str, Any] | None = None,
    tokenizer: bool = True,
) -> Path:
    """A model as llm-compressor saves it; `said` is quantization_config."""
    data = tiny_models.config() if data is None else data
    weights = int8_weights(tiny_models.tensors(data), floats) if weights is None else weights
    said = section(ignore=["lm_head", *floats]) if said is None else said
    _write_folder(folder, {**data, "quantization_config": said}, tokenizer)
    save_file(dict(weights), folder / "model.safetensors")
    return folder


FP8_CODE_MAX = 448.0

FP8_SECTION: Mapping[str, Any] = {
    "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
    "weight_block_size": [128, 128],
}  # fmt: skip
"""quantization_config of Qwen/Qwen3-8B-FP8."""


def fp8_weights(
    weights: Mapping[str, Tensor], floats: Collection[str] = (), dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Every linear but `floats` (and the output projection) as float8 codes and scales of a type,
    for blocks of 128 x 128; those at the edges are smaller."""
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if not is_linear(name) or name.removesuffix(".weight") in floats:
            found[name] = tensor
            continue
        codes = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn)
        grid = [-(-length // 128) for length in tensor.shape]
        scales = torch.empty(grid, dtype=dtype)
        for row in range(grid[0]):
            for column in range(grid[1]):
                block = (slice(row * 128, row * 128 + 128), slice(column * 128, column * 128 + 128))
                scales[row, column] = tensor[block].float().abs().max() / FP8_CODE_MAX
                codes[block] = tensor[block].float() / scales[row, column].float()
        found[name], found[f"{name}_scale_inv"] = codes, scales
    return found


def write_fp8(
    folder: Path,
    data: Mapping[str, Any] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    *,
    floats: Collection[str] = (),
    said: Mapping[str, Any] = FP8_SECTION,
    tokenizer: bool = True,
) -> Path:
    """A model as Qwen publishes it in FP8; `said` is quantization_config."""
    data = tiny_models.config() if data is None else data
    weights = fp8_weights(tiny_models.tensors(data), floats) if weights is None else weights
    _write_folder(folder, {**data, "quantization_config": dict(said)}, tokenizer)
    save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def grouped_integers(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Integers from 0 to 15 about 8, [N, K], and scales, float16 [N, K / group], of a weight; as
    GPTQ's observer finds them: the range is symmetric, and its ends are 0 and 15."""
    groups = weight.float().unflatten(1, (-1, group))
    scales = (groups.abs().amax(-1) / 7.5).half()
    integers = torch.round(groups / scales[..., None].float()) + 8
    return integers.clamp(0, 15).to(torch.int32).flatten(1), scales


def asymmetric_integers(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Integers from 0 to 15, scales, and zero points [N, K / group] from 1 to 15, as AutoAWQ finds
    them (`pseudo_quantize_tensor`); older GPTQ cannot state a zero point of 0."""
    groups = weight.float().unflatten(1, (-1, group))
    least, largest = groups.amin(-1), groups.amax(-1)
    scales = ((largest - least) / 15).half()
    zeros = (-torch.round(least / scales.float())).clamp(1, 15)
    integers = torch.round(groups / scales[..., None].float()) + zeros[..., None]
    return integers.clamp(0, 15).to(torch.int32).flatten(1), scales, zeros.to(torch.int32)


def words(integers: Tensor, places: Sequence[int] = range(8)) -> Tensor:
    """Integers of four bits along the first axis, eight to an int32: the first in the lowest bits,
    or where `places` says."""
    found = torch.zeros(integers.shape[0] // 8, *integers.shape[1:], dtype=torch.int64)
    for index, place in enumerate(places):
        found |= integers[index::8].long() << 4 * place
    return torch.where(found >= 1 << 31, found - (1 << 32), found).to(torch.int32)


def gptq_tensors(
    integers: Tensor, scales: Tensor, zeros: Tensor | None = None
) -> dict[str, Tensor]:
    """A linear as AutoGPTQ stores it, whose zero points are less by one."""
    inputs = integers.shape[1]
    zeros = torch.full(scales.shape, 8) if zeros is None else zeros
    return {
        "qweight": words(integers.t().contiguous()), "qzeros": words(zeros - 1).t().contiguous(),
        "scales": scales.t().contiguous(),
        "g_idx": (torch.arange(inputs) // (inputs // scales.shape[1])).int(),
    }  # fmt: skip


def awq_tensors(integers: Tensor, scales: Tensor, zeros: Tensor | None = None) -> dict[str, Tensor]:
    """A linear as AutoAWQ stores it: outputs 0, 2, 4, 6, 1, 3, 5, 7 in the order of the bits."""
    places = [0, 4, 1, 5, 2, 6, 3, 7]
    zeros = torch.full(scales.shape, 8) if zeros is None else zeros
    return {
        "qweight": words(integers, places).t().contiguous(),
        "qzeros": words(zeros, places).t().contiguous(), "scales": scales.t().contiguous(),
    }  # fmt: skip


PACKED: Mapping[str, tuple[Callable[..., dict[str, Tensor]], dict[str, Any]]] = {
    "gptq": (gptq_tensors, {"bits": 4, "desc_act": False, "quant_method": "gptq"}),
    "awq": (awq_tensors, {"bits": 4, "version": "gemm", "quant_method": "awq"}),
}


def write_packed(
    folder: Path,
    data: Mapping[str, Any] | None = None,
    *,
    format: str = "gptq",
    group: int = 32,
    zero_points: bool = False,
    floats: Collection[str] = (),
    said: Mapping[str, Any] | None = None,
    tokenizer: bool = True,
) -> Path:
    """A model as GPTQ or AWQ store it; `said` are changes of quantization_config."""
    data = tiny_models.config() if data is None else data
    tensors, section = PACKED[format]
    choose = asymmetric_integers if zero_points else grouped_integers
    found: dict[str, Tensor] = {}
    for name, tensor in tiny_models.tensors(data).items():
        linear = name.removesuffix(".weight")
        if not is_linear(name) or linear in floats:
            found[name] = tensor
            continue
        for suffix, stored in tensors(*choose(tensor, group)).items():
            found[f"{linear}.{suffix}"] = stored
    symmetry = {"zero_point": zero_points} if format == "awq" else {"sym": not zero_points}
    section = {**section, **symmetry, "group_size": group, **(said or {})}
    _write_folder(folder, {**data, "quantization_config": section}, tokenizer)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


WRITERS: Mapping[str, Callable[..., Path]] = {
    "ascendv1": write_ascendv1,
    "compressed-tensors": write_compressed_tensors,
}


def source_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a source."""
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def _write_folder(folder: Path, data: Mapping[str, Any], tokenizer: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(data))
    for name in tiny_models.TOKENIZER_FILES if tokenizer else ():
        shutil.copyfile(tiny_models.DATA / name, folder / name)
