"""npu_rms_norm, npu_add_rms_norm, npu_add_rms_norm_dynamic_quant, npu_add_rms_norm_quant.

Open in the documentation: whether the norm of the sum is taken before or after the sum is rounded
to the dtype of x (here: after, so that it is the norm of the residual the operator returns; kernels
of ops-nn at e5c3fa93 take it before, at least for some shapes), and whether the normed row is
rounded before it is quantized (here: it is not).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from .. import cann
from ..doors.aclnn import aclnn
from ..limits import is_310p, require, require_a2_or_a3, require_dtype, require_nd, require_shape
from ..tensors import DeviceTensor, Layout
from .quant import quantize_rows, static_codes

HALF = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, *HALF)


def rms(x: torch.Tensor, dims: int, epsilon: float) -> torch.Tensor:
    """1 / sqrt(mean(x^2) + epsilon) over the last `dims` dimensions, in float32."""
    axes = tuple(range(-dims, 0))
    return torch.rsqrt(x.square().mean(axes, keepdim=True) + epsilon)


@cache
def check_norm(operator: str, x: Layout, gamma: Layout) -> None:
    require_dtype(operator, "x", x, FLOATS)
    require_nd(operator, x=x, gamma=gamma)
    tail = x.size[x.dims - gamma.dims :]
    require(gamma.size == tail, operator, f"gamma {gamma.size} must be the last dims of x {x.size}")
    require(x.dims <= 8, operator, "x has at most 8 dims")
    if is_310p():
        require(x.dtype is not torch.bfloat16, operator, "has no bfloat16 on 310P")
        wide = x.size[-1] * x.dtype.itemsize >= 32
        require(wide, operator, "the last dim must be at least 32 bytes on 310P")


@cache
def check_rms_norm(x: Layout, gamma: Layout) -> None:
    operator = "npu_rms_norm"
    check_norm(operator, x, gamma)
    require(x.dims >= 2, operator, "x must have 2 to 8 dims")
    float_gamma = not is_310p() and gamma.dtype is torch.float32
    rule = "gamma must have the dtype of x, or float32"
    require(gamma.dtype is x.dtype or float_gamma, operator, rule)


@cache
def check_add(operator: str, x1: Layout, x2: Layout, gamma: Layout) -> None:
    check_norm(operator, x1, gamma)
    require_shape(operator, "x2", x2, x1.size)
    same = x1.dtype is x2.dtype is gamma.dtype
    require(same, operator, "x1, x2 and gamma must have one dtype")
    require(x1.elements, operator, "an empty tensor is not supported")


@cache
def check_add_quant(
    x1: Layout, x2: Layout, gamma: Layout, vectors: tuple[Layout | None, ...]
) -> None:
    operator = "npu_add_rms_norm_dynamic_quant"
    require_a2_or_a3(operator)
    require_dtype(operator, "x1", x1, HALF)
    require(x1.dims >= 2, operator, "x1 must have 2 to 8 dims")
    require(gamma.dims == 1, operator, "gamma must be one-dimensional")
    check_add(operator, x1, x2, gamma)
    for vector in vectors:
        if vector is not None:
            require_shape(operator, "smooth_scale and beta", vector, gamma.size)
            require(
                vector.dtype is x1.dtype, operator, "smooth_scale and beta share the dtype of x1"
            )


def check_masked_output(y2: Layout, total: Layout) -> None:
    """A masked y2 is computed as [1] and copied to what was allocated for it, [] or [1].  The
    wheels for CANN 8.3 allocate the shape of x, and the copy refuses that."""
    size = total.size if cann.current().whole_masked_output else y2.size
    rule = f"EZ1001: Input tensor's shape[[1]] should be same with output's shape[{list(size)}]"
    require(size in ((), (1,), (0,)), "npu_add_rms_norm_dynamic_quant", rule)


def residual_sum(x1: DeviceTensor, x2: DeviceTensor) -> torch.Tensor:
    """x1 + x2, rounded once to their dtype."""
    return (x1.read().float() + x2.read().float()).to(x1.layout.dtype)


@aclnn("aclnnRmsNorm", "x:T gamma:T epsilon:d y:T rstd:T")
def rms_norm(
    x: DeviceTensor, gamma: DeviceTensor, epsilon: float, y: DeviceTensor, rstd: DeviceTensor
) -> Callable[[], None]:
    check_rms_norm(x.layout, gamma.layout)

    def run() -> None:
        values = x.read().float()
        inverse = rms(values, gamma.layout.dims, epsilon)
        y.write(values * inverse * gamma.read().float())
        rstd.write(inverse)

    return run


@aclnn("aclnnAddRmsNorm", "x1:T x2:T gamma:T epsilon:d y:T rstd:T total:T")
def add_rms_norm(
    x1: DeviceTensor,
    x2: DeviceTensor,
    gamma: DeviceTensor,
    epsilon: float,
    y: DeviceTensor,
    rstd: DeviceTensor,
    total: DeviceTensor,
) -> Callable[[], None]:
    check_add("npu_add_rms_norm", x1.layout, x2.layout, gamma.layout)

    def run() -> None:
        rounded = residual_sum(x1, x2)
        values = rounded.float()
        inverse = rms(values, gamma.layout.dims, epsilon)
        total.write(rounded)
        y.write(values * inverse * gamma.read().float())
        rstd.write(inverse)

    return run


@aclnn(
    "aclnnAddRmsNormDynamicQuantV2",
    "x1:T x2:T gamma:T smooth1:T smooth2:T beta:T epsilon:d mask:B "
    "y1:T y2:T total:T scale1:T scale2:T",
)
def add_rms_norm_dynamic_quant(
    x1: DeviceTensor,
    x2: DeviceTensor,
    gamma: DeviceTensor,
    smooth1: DeviceTensor | None,
    smooth2: DeviceTensor | None,
    beta: DeviceTensor | None,
    epsilon: float,
    mask: list[bool] | None,
    y1: DeviceTensor,
    y2: DeviceTensor,
    total: DeviceTensor,
    scale1: DeviceTensor,
    scale2: DeviceTensor,
) -> Callable[[], None]:
    operator = "npu_add_rms_norm_dynamic_quant"
    vectors = tuple(None if v is None else v.layout for v in (smooth1, smooth2, beta))
    check_add_quant(x1.layout, x2.layout, gamma.layout, vectors)
    require(y1.layout.dtype is torch.int8, operator, "only int8 output is simulated")
    wanted = mask or [True, smooth1 is not None and smooth2 is not None]
    if mask:
        for name, smooth, asked in (("1", smooth1, mask[0]), ("2", smooth2, mask[1])):
            require(smooth is None or asked, operator, f"smooth_scale{name} needs its output_mask")
        if not mask[1]:
            check_masked_output(y2.layout, total.layout)
    outputs = [(smooth1, y1, scale1), (smooth2, y2, scale2)]

    def run() -> None:
        rounded = residual_sum(x1, x2)
        values = rounded.float()
        normed = values * rms(values, 1, epsilon) * gamma.read().float()
        if beta is not None:
            normed = normed + beta.read().float()
        total.write(rounded)
        for asked, (smooth, codes, scale) in zip(wanted, outputs, strict=True):
            if asked:
                smoothed = normed if smooth is None else normed * smooth.read().float()
                row_codes, row_scale = quantize_rows(smoothed)
                codes.write(row_codes)
                scale.write(row_scale)

    return run


@cache
def check_static_quant(
    x1: Layout, x2: Layout, gamma: Layout, scales: Layout, offsets: Layout | None
) -> None:
    """add_rms_norm_quant_def.cpp of ops-nn, and aclnnAddRmsNormQuant.md for A2 and A3."""
    operator = "npu_add_rms_norm_quant"
    require_a2_or_a3(operator)
    require_dtype(operator, "x1", x1, HALF)
    check_add(operator, x1, x2, gamma)
    require_shape(operator, "scales1", scales, gamma.size)
    half = x1.dtype is torch.bfloat16 and scales.dtype is torch.bfloat16
    single = scales.dtype is torch.float32
    rule = f"scales1 {scales.dtype} does not go with x1 {x1.dtype}"
    require(half or single, operator, rule)
    if offsets is not None:
        require_shape(operator, "zero_points1", offsets, scales.size)
        wanted = torch.bfloat16 if half else torch.int32
        rule = f"zero_points1 {offsets.dtype} does not go with scales1 {scales.dtype}"
        require(offsets.dtype is wanted, operator, rule)


def plan_static_quant(
    x1: DeviceTensor,
    x2: DeviceTensor,
    gamma: DeviceTensor,
    scales: DeviceTensor,
    second: DeviceTensor | None,
    offsets: DeviceTensor | None,
    epsilon: float,
    divides: bool,
    y1: DeviceTensor,
    total: DeviceTensor,
) -> Callable[[], None]:
    """y = round(norm / scales1 + zero_points1); add_rms_norm_quant.h rounds nothing in between."""
    operator = "npu_add_rms_norm_quant"
    check_static_quant(
        x1.layout, x2.layout, gamma.layout, scales.layout, offsets and offsets.layout
    )
    pair = (x1.layout.dtype, scales.layout.dtype)
    newer = pair == (torch.bfloat16, torch.float32)
    rule = f"scales1 {pair[1]} does not go with x1 {pair[0]} in CANN {cann.current().name}"
    require(cann.current().single_norm_scales or not newer, operator, rule)
    require(second is None, operator, "scales2 is not simulated")
    require(divides, operator, "div_mode must be True on A2 and A3")
    require(y1.layout.dtype is torch.int8, operator, "only int8 output is simulated")

    def run() -> None:
        rounded = residual_sum(x1, x2)
        values = rounded.float()
        normed = values * rms(values, 1, epsilon) * gamma.read().float()
        offset = 0.0 if offsets is None else offsets.read().float()
        total.write(rounded)
        y1.write(static_codes(normed / scales.read().float(), offset))

    return run


@aclnn(
    "aclnnAddRmsNormQuant",
    "x1:T x2:T gamma:T scales1:T scales2:T offsets1:T offsets2:T axis:i epsilon:d divides:b "
    "y1:T y2:T total:T",
)
def add_rms_norm_quant(
    x1: DeviceTensor,
    x2: DeviceTensor,
    gamma: DeviceTensor,
    scales1: DeviceTensor,
    scales2: DeviceTensor | None,
    offsets1: DeviceTensor | None,
    offsets2: DeviceTensor | None,
    axis: int,
    epsilon: float,
    divides: bool,
    y1: DeviceTensor,
    y2: DeviceTensor,
    total: DeviceTensor,
) -> Callable[[], None]:
    """`axis` has no effect but with -1, which torch_npu sees to."""
    return plan_static_quant(x1, x2, gamma, scales1, scales2, offsets1, epsilon, divides, y1, total)


@aclnn(
    "aclnnAddRmsNormQuantV2",
    "x1:T x2:T gamma:T scales1:T scales2:T offsets1:T offsets2:T beta:T axis:i epsilon:d divides:b "
    "y1:T y2:T total:T normed:T",
)
def add_rms_norm_quant_v2(
    x1: DeviceTensor,
    x2: DeviceTensor,
    gamma: DeviceTensor,
    scales1: DeviceTensor,
    scales2: DeviceTensor | None,
    offsets1: DeviceTensor | None,
    offsets2: DeviceTensor | None,
    beta: DeviceTensor | None,
    axis: int,
    epsilon: float,
    divides: bool,
    y1: DeviceTensor,
    y2: DeviceTensor,
    total: DeviceTensor,
    normed: DeviceTensor | None,
) -> Callable[[], None]:
    require(beta is None, "npu_add_rms_norm_quant", "beta is not simulated")
    return plan_static_quant(x1, x2, gamma, scales1, scales2, offsets1, epsilon, divides, y1, total)
