"""npu_dynamic_quant, and the one definition of per-token quantization.

scale = max|row| / 127 in float32, code = round-half-even(x / scale), clipped to [-128, 127].  A row
of zeros has scale 0 and codes 0.  The documentation says "round" and no more; half-even is the
choice of this project's numerics contract.
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
