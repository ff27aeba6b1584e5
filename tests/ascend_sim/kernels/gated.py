"""npu_swiglu, npu_swiglu_quant, npu_dequant_swiglu_quant.

Open in the documentation: whether the activation is rounded to 16 bits before it is quantized.
Here everything between reading and quantizing is float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from .. import faults
from ..doors.aclnn import aclnn
from ..limits import (
    require,
    require_a2_or_a3,
    require_contiguous,
    require_dtype,
    require_nd,
    require_shape,
)
from ..tensors import DeviceTensor, Layout
from .quant import quantize_rows

HALF = (torch.float16, torch.bfloat16)
MAX_SWIGLU_QUANT = 8192
ONE_TILE_COLUMNS = 7840
"""The widest output row that npu_dequant_swiglu_quant computes in one tile: 196608 bytes of unified
buffer, 25 an element, in steps of 32."""


def swiglu_values(x: torch.Tensor, dim: int, activate_left: bool) -> torch.Tensor:
    """left / (1 + exp(-left)) * right, in this order (swi_glu_bf16.hpp and dequant_swiglu_quant.h
    of ops-nn at e5c3fa93)."""
    left, right = x.chunk(2, dim)
    if not activate_left:
        left, right = right, left
    return torch.nn.functional.silu(left) * right


@cache
def check_swiglu(x: Layout, dim: int) -> None:
    operator = "npu_swiglu"
    require_dtype(operator, "input", x, (torch.float32, *HALF))
    require_nd(operator, input=x)
    require_contiguous(operator, input=x)
    require(x.elements, operator, "an empty tensor is not supported")
    require(-x.dims <= dim < x.dims, operator, f"dim {dim} is out of range")
    require(x.size[dim] % 2 == 0, operator, f"size {x.size[dim]} of dim {dim} must be even")


@aclnn("aclnnSwiGlu", "x:T dim:i out:T")
def swiglu(x: DeviceTensor, dim: int, out: DeviceTensor) -> Callable[[], None]:
    check_swiglu(x.layout, dim)
    return lambda: out.write(swiglu_values(x.read().float(), dim, activate_left=True))


@cache
def check_swiglu_quant(x: Layout, smooth: Layout | None, mode: str, out_type: int) -> None:
    operator = "npu_swiglu_quant"
    require_a2_or_a3(operator)
    require_dtype(operator, "x", x, (torch.float32, *HALF))
    require(x.dims > 1, operator, "x must have more than one dim")
    require(x.size[-1] % 2 == 0, operator, "the last dim of x must be even")
    limit = f"the last dim of x may be {MAX_SWIGLU_QUANT} at most, not {x.size[-1]}"
    require(x.size[-1] <= MAX_SWIGLU_QUANT, operator, limit)
    require(mode == "dynamic", operator, "static quantization (quant_mode=0) is not simulated")
    require(out_type == 2, operator, "only int8 output is simulated")
    if smooth is not None:
        require_dtype(operator, "smooth_scales", smooth, (torch.float32,))
        require_shape(operator, "smooth_scales", smooth, (1, x.size[-1] // 2))


@aclnn(
    "aclnnSwiGluQuantV2",
    "x:T smooth:T offsets:T group:T activate_left:b mode:s group_type:i out_type:i y:T scale:T",
)
def swiglu_quant(
    x: DeviceTensor,
    smooth: DeviceTensor | None,
    offsets: DeviceTensor | None,
    group: DeviceTensor | None,
    activate_left: bool,
    mode: str,
    group_type: int,
    out_type: int,
    y: DeviceTensor,
    scale: DeviceTensor,
) -> Callable[[], None]:
    check_swiglu_quant(x.layout, smooth and smooth.layout, mode, out_type)
    require(group is None, "npu_swiglu_quant", "group_index is not simulated")

    def run() -> None:
        values = swiglu_values(x.read().float(), -1, activate_left)
        if smooth is not None:
            values = values * smooth.read().float()
        codes, row_scale = quantize_rows(values)
        y.write(codes)
        scale.write(row_scale)

    return run


@cache
def check_dequant(
    x: Layout,
    weight_scale: Layout | None,
    activation_scale: Layout | None,
    quant_scale: Layout | None,
    mode: str,
) -> None:
    operator = "npu_dequant_swiglu_quant"
    require_a2_or_a3(operator)
    require_dtype(operator, "x", x, (torch.int32, *HALF))
    require_nd(operator, x=x)
    require(x.dims == 2, operator, "x must be two-dimensional")
    require(x.size[-1] % 2 == 0, operator, "the last dim of x must be even")
    require(mode == "dynamic", operator, "static quantization (quant_mode=0) is not simulated")
    tokens, columns = x.size
    if x.dtype is torch.int32:
        require(activation_scale is not None, operator, "int32 x needs activation_scale")
        require(weight_scale is not None, operator, "int32 x needs weight_scale")
    else:
        require(activation_scale is None, operator, "activation_scale must be None for 16-bit x")
    for name, scale, shape in (
        ("weight_scale", weight_scale, (1, columns)),
        ("activation_scale", activation_scale, (tokens, 1)),
    ):
        if scale is not None:
            require_dtype(operator, name, scale, (torch.float32,))
            require_shape(operator, name, scale, shape)
    if quant_scale is not None:
        require_dtype(operator, "quant_scale", quant_scale, (torch.float32,))
        require_shape(operator, "quant_scale", quant_scale, (1, columns // 2))


def plan_dequant(
    x: DeviceTensor,
    weight_scale: DeviceTensor | None,
    activation_scale: DeviceTensor | None,
    bias: DeviceTensor | None,
    quant_scale: DeviceTensor | None,
    quant_offset: DeviceTensor | None,
    group: DeviceTensor | None,
    activate_left: bool,
    mode: str,
    y: DeviceTensor,
    scale: DeviceTensor,
) -> Callable[[], None]:
    operator = "npu_dequant_swiglu_quant"
    layouts = (t and t.layout for t in (weight_scale, activation_scale, quant_scale))
    check_dequant(x.layout, *layouts, mode)
    require(group is None, operator, "group_index (mixture of experts) is not simulated")
    unused = bias is None and quant_offset is None
    require(unused, operator, "bias and quant_offset are not simulated")

    def run() -> None:
        values = x.read().float()
        if weight_scale is not None:
            values = values * weight_scale.read()
        if activation_scale is not None:
            values = values * activation_scale.read()
        values = swiglu_values(values, -1, activate_left)
        if quant_scale is not None:
            values = values * quant_scale.read().float()
        codes, row_scale = quantize_rows(values)
        if values.shape[-1] > ONE_TILE_COLUMNS and faults.planted("corrupt_wide_swiglu"):
            row_scale = row_scale / 2  # as of a maximum that is read before it is complete
            codes = torch.round(values / row_scale.unsqueeze(-1)).clamp_(-128, 127)
        y.write(codes)
        scale.write(row_scale)

    return run


DEQUANT_INPUTS = (
    "x:T weight_scale:T activation_scale:T bias:T quant_scale:T quant_offset:T group:T "
    "activate_left:b mode:s "
)
aclnn("aclnnDequantSwigluQuant", DEQUANT_INPUTS + "y:T scale:T")(plan_dequant)


@aclnn(
    "aclnnDequantSwigluQuantV2",
    DEQUANT_INPUTS
    + "dtype:i rounding:s activate_dim:i variant:i limit:d alpha:d bias:d y:T scale:T",
)
def dequant_swiglu_quant(*arguments: Any) -> Callable[[], None]:
    *inputs, _dtype, rounding, activate_dim, variant, _limit, _alpha, _bias, y, scale = arguments
    plain = variant == 0 and rounding == "rint" and activate_dim == -1
    require(plain, "npu_dequant_swiglu_quant", "only the plain SwiGLU (swiglu_mode=0) is simulated")
    return plan_dequant(*(*inputs, y, scale))
