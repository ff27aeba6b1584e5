"""npu_dynamic_quant, npu_quantize, and the one definition of each kind of quantization.

scale = max|row| / 127 in float32, code = round-half-even(x / scale), clipped to [-128, 127].  A row
of zeros has scale 0 and codes 0.  The documentation says "round" and no more; half-even is the
choice of this project's numerics contract.

npu_quantize with div_mode=False: code = round(x * scale + offset) with halves to even, all in
float32, clipped (ascend_quant_v2_bf16.h of ops-nn: Mul, Add, CAST_RINT).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from ..doors.aclnn import aclnn
from ..limits import require, require_a2_or_a3, require_dtype, require_nd, require_shape
from ..tensors import DeviceTensor, Layout


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 rows -> int8 codes (still in float32) and float32 scales."""
    scale = x.abs().amax(-1) / 127
    divisor = scale.masked_fill(scale == 0, 1.0).unsqueeze(-1)
    return torch.round(x / divisor).clamp_(-128, 127), scale


def static_codes(x: torch.Tensor, offset: torch.Tensor | float) -> torch.Tensor:
    """float32 values that a scale has been applied to -> int8 codes (still in float32)."""
    return torch.round(x + offset).clamp_(-128, 127)


@cache
def check_dynamic_quant(x: Layout, smooth: Layout | None, codes: Layout) -> None:
    operator = "npu_dynamic_quant"
    require_a2_or_a3(operator)
    require_dtype(operator, "x", x, (torch.float16, torch.bfloat16))
    require_nd(operator, x=x)
    require(x.dims > 1, operator, "x must have more than one dim")
    require(codes.dtype is torch.int8, operator, "only int8 output is simulated")
    if smooth is not None:
        require_dtype(operator, "smooth_scales", smooth, (torch.float16, torch.bfloat16))
        require_shape(operator, "smooth_scales", smooth, x.size[-1:])


def plan_dynamic_quant(
    x: DeviceTensor, smooth: DeviceTensor | None, codes: DeviceTensor, scale: DeviceTensor
) -> Callable[[], None]:
    check_dynamic_quant(x.layout, smooth and smooth.layout, codes.layout)

    def run() -> None:
        values = x.read().float()
        if smooth is not None:
            values = values * smooth.read().float()
        row_codes, row_scale = quantize_rows(values)
        codes.write(row_codes)
        scale.write(row_scale)

    return run


@aclnn("aclnnDynamicQuant", "x:T smooth:T codes:T scale:T")
def dynamic_quant(
    x: DeviceTensor, smooth: DeviceTensor | None, codes: DeviceTensor, scale: DeviceTensor
) -> Callable[[], None]:
    return plan_dynamic_quant(x, smooth, codes, scale)


@aclnn("aclnnDynamicQuantV2", "x:T smooth:T group:T dtype:i codes:T scale:T offset:T")
def dynamic_quant_v2(
    x: DeviceTensor,
    smooth: DeviceTensor | None,
    group: DeviceTensor | None,
    dtype: int,
    codes: DeviceTensor,
    scale: DeviceTensor,
    offset: DeviceTensor | None,
) -> Callable[[], None]:
    operator = "npu_dynamic_quant"
    require(group is None, operator, "group_index (mixture of experts) is not simulated")
    require(offset is None, operator, "asymmetric quantization is not simulated")
    return plan_dynamic_quant(x, smooth, codes, scale)


ROUND_TO_EVEN = "round"


@cache
def check_quantize(x: Layout, scale: Layout, offset: Layout | None, codes: Layout) -> None:
    """aclnn_ascend_quant_v3.cpp of ops-nn: CheckDtypeValid, CheckDim."""
    operator = "npu_quantize"
    require_a2_or_a3(operator)
    require_dtype(operator, "input", x, (torch.float32, torch.float16, torch.bfloat16))
    rule = f"scales must have the dtype of input, not {scale.dtype} beside {x.dtype}"
    require(scale.dtype is x.dtype, operator, rule)
    require_nd(operator, input=x)
    require(scale.dims == 1, operator, "only one-dimensional scales are simulated")
    fits = scale.size in ((1,), x.size[-1:])
    require(fits, operator, f"scales must have 1 or {x.size[-1]} elements, not {scale.size}")
    if offset is not None:
        rule = "zero_points must have the dtype of scales"
        require(offset.dtype is scale.dtype, operator, rule)
        require_shape(operator, "zero_points", offset, scale.size)
    require(codes.dtype is torch.int8, operator, "only int8 output is simulated")


@aclnn("aclnnAscendQuantV3", "x:T scale:T offset:T root:b rounding:s dtype:i axis:i codes:T")
def quantize(
    x: DeviceTensor,
    scale: DeviceTensor,
    offset: DeviceTensor | None,
    root: bool,
    rounding: str,
    dtype: int,
    axis: int,
    codes: DeviceTensor,
) -> Callable[[], None]:
    check_quantize(x.layout, scale.layout, offset and offset.layout, codes.layout)
    plain = not root and rounding == ROUND_TO_EVEN and axis == -1
    require(plain, "npu_quantize", "only plain codes along the last dim are simulated")

    def run() -> None:
        scaled = x.read().float() * scale.read().float()
        codes.write(static_codes(scaled, 0.0 if offset is None else offset.read().float()))

    return run
