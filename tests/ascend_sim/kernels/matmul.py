"""Matrix products: mm, matmul, bmm, linear, with ND and NZ weights, npu_quant_matmul,
and _npu_matmul_add_fp32 (ATB)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from .. import nz
from ..doors.aclnn import aclnn
from ..doors.atb import atb
from ..limits import (
    is_310p,
    is_a2_or_a3,
    require,
    require_a2_or_a3,
    require_contiguous,
    require_dtype,
    require_nd,
    require_shape,
)
from ..tensors import DeviceTensor, Layout

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MAX_INNER = 65535
# The longest sum of products of two int8 numbers that float32 holds exactly.
EXACT_IN_FLOAT32 = 2**24 // (128 * 128)


# -------------------------------------------------------------------------- floating matmul
@cache
def check_matmul(operator: str, a: Layout, b: Layout) -> None:
    require_dtype(operator, "the left matrix", a, FLOATS)
    require(a.dtype is b.dtype, operator, f"dtypes differ: {a} and {b}")
    require(a.dims >= 1 and b.dims >= 1, operator, "a scalar is not a matrix")
    inner = b.size[-2] if b.dims > 1 else b.size[0]
    require(a.size[-1] == inner, operator, f"inner dims differ: {a} and {b}")
    require(not a.nz, operator, "the left matrix must be in format ND")
    if b.nz:
        two = a.dims == 2 and b.dims == 2
        require(two, operator, f"an NZ weight multiplies 2-D by 2-D only, not {a} by {b}")
        require(min(b.size) > 1, operator, "an NZ weight must not have a dim of 1")
        require_storage(operator, b)


def require_storage(operator: str, weight: Layout) -> None:
    """The kernel derives the tile grid from the view; torch_npu only passes the storage on."""
    stored = weight.size[:-2] + weight.size[:-3:-1] if weight.transposed else weight.size
    expected = nz.storage_shape(stored, weight.dtype)
    rule = f"the NZ storage {weight.storage_size} does not belong to the weight {weight.size}"
    require(weight.storage_size == expected, operator, rule)


def float_product(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """a @ b + bias, summed in float32 and rounded once. bfloat16 is summed in the order of torch's
    own linear (README, "The order of float sums"), for which b lies as a weight [N, K] does; unless
    the bias has more bits than that takes."""
    b = b.mT.contiguous().mT if b.dim() > 1 else b
    half = a.dtype is torch.bfloat16
    if bias is None:
        return torch.matmul(a, b) if half else torch.matmul(a.float(), b.float())
    rounded = bias.to(a.dtype)
    if half and torch.equal(rounded.to(bias.dtype), bias):
        return torch.addmm(rounded, a, b)
    return torch.matmul(a.float(), b.float()) + bias.float()


def plan_matmul(
    operator: str, a: DeviceTensor, b: DeviceTensor, out: DeviceTensor
) -> Callable[[], None]:
    check_matmul(operator, a.layout, b.layout)
    return lambda: out.write(float_product(a.read(), b.read()))


@aclnn("aclnnMm", "a:T b:T out:T cube:i")
@aclnn("aclnnMatmul", "a:T b:T out:T cube:i")
@aclnn("aclnnBatchMatMul", "a:T b:T out:T cube:i")
def matmul(a: DeviceTensor, b: DeviceTensor, out: DeviceTensor, cube: int) -> Callable[[], None]:
    require(not b.layout.nz, "matmul", "an NZ weight needs aclnnMatmulWeightNz")
    return plan_matmul("matmul", a, b, out)


@aclnn("aclnnMatmulWeightNz", "a:T b:T out:T cube:i")
def matmul_weight_nz(
    a: DeviceTensor, b: DeviceTensor, out: DeviceTensor, cube: int
) -> Callable[[], None]:
    require(b.layout.nz, "matmul with an NZ weight", "the weight must be in format NZ")
    return plan_matmul("matmul with an NZ weight", a, b, out)


@aclnn("aclnnAddmm", "bias:T a:T b:T beta:S alpha:S out:T cube:i")
@aclnn("aclnnAddmmWeightNz", "bias:T a:T b:T beta:S alpha:S out:T cube:i")
def addmm(
    bias: DeviceTensor,
    a: DeviceTensor,
    b: DeviceTensor,
    beta: float,
    alpha: float,
    out: DeviceTensor,
    cube: int,
) -> Callable[[], None]:
    """A linear with a bias: one rounding, after the bias is added in float32."""
    check_matmul("addmm", a.layout, b.layout)
    rule = f"the bias {bias.layout} does not belong to {out.layout}"
    require(bias.layout.size[-1] == out.layout.size[-1], "addmm", rule)
    require(bias.layout.dtype is a.layout.dtype, "addmm", rule)

    def run() -> None:
        if alpha == beta == 1:
            out.write(float_product(a.read(), b.read(), bias.read()))
            return
        product = torch.matmul(a.read().float(), b.read().float())
        out.write(beta * bias.read().float() + alpha * product)

    return run


@aclnn("aclnnInplaceAddmm", "total:T a:T b:T beta:S alpha:S cube:i")
def inplace_addmm(
    total: DeviceTensor, a: DeviceTensor, b: DeviceTensor, beta: float, alpha: float, cube: int
) -> Callable[[], None]:
    """A sum of products that stays where it is, of the product's shape: nothing is broadcast.
    Source: ops-nn, matmul/mat_mul_v3/docs/aclnnAddmm&aclnnInplaceAddmm.md."""
    check_matmul("addmm_", a.layout, b.layout)
    require_nd("addmm_", total=total.layout)
    require_shape("addmm_", "the sum", total.layout, (a.layout.size[0], b.layout.size[1]))
    require_dtype("addmm_", "the sum", total.layout, (a.layout.dtype,))

    def run() -> None:
        product = torch.matmul(a.read().float(), b.read().float())
        total.write(beta * total.read().float() + alpha * product)

    return run


# ------------------------------------------------------------------------- npu_quant_matmul
QUANT = "npu_quant_matmul"


@cache
def check_quant_operands(x: Layout, weight: Layout, out: Layout) -> None:
    require(is_a2_or_a3() or is_310p(), QUANT, "other devices than A2, A3, 310P are not simulated")
    require_dtype(QUANT, "x1", x, (torch.int8,))
    require_dtype(QUANT, "x2", weight, (torch.int8,))
    require(2 <= x.dims <= 6, QUANT, "x1 must have 2 to 6 dims")
    require(weight.dims == 2, QUANT, "only a two-dimensional x2 is simulated")
    require(x.size[-1] == weight.size[0], QUANT, f"inner dims differ: {x} and {weight}")
    for name, layout in (("x1", x), ("x2", weight)):
        rule = f"the last dim of {name} may be {MAX_INNER} at most, not {layout.size[-1]}"
        require(layout.size[-1] <= MAX_INNER, QUANT, rule)
    require(not x.nz, QUANT, "x1 must be in format ND")
    require_contiguous(QUANT, x1=x)
    rule = "x2 must be contiguous or a transposed view"
    require(weight.contiguous or weight.transposed, QUANT, rule)
    if weight.nz:
        require(min(weight.size) > 1, QUANT, "an NZ weight must not have a dim of 1")
        require_storage(QUANT, weight)
        upright = weight.transposed or not is_310p()
        require(upright, QUANT, "310P wants NZ of [N, K], used as a transposed view")
    allowed = (
        (torch.float16, torch.int8)
        if is_310p()
        else (torch.bfloat16, torch.float16, torch.int8, torch.int32)
    )
    require_dtype(QUANT, "the output", out, allowed)


@cache
def check_quant_scales(
    x: Layout,
    weight: Layout,
    token: Layout | None,
    channel: Layout,
    bias: Layout | None,
    out: Layout,
) -> None:
    columns, rows = weight.size[-1], x.size[-2]
    fits = channel.size in ((1,), (columns,))
    require(fits, QUANT, f"scale must have shape (1,) or ({columns},)")
    rule = f"scale {channel.dtype} does not go with output {out.dtype}"
    if out.dtype is torch.float16:
        require(token is not None, QUANT, "static float16 output is not simulated")
        require(channel.dtype is torch.float32, QUANT, rule)
    elif out.dtype in (torch.bfloat16, torch.int32):
        require(channel.dtype in (torch.float32, torch.bfloat16), QUANT, rule)
    else:
        require(False, QUANT, "int8 output is not simulated")
    if token is not None:
        require(not is_310p(), QUANT, "310P has no pertoken_scale")
        require(out.dtype is not torch.int32, QUANT, "int32 output takes no pertoken_scale")
        require_dtype(QUANT, "pertoken_scale", token, (torch.float32,))
        require(token.size == (rows,), QUANT, f"pertoken_scale must have shape ({rows},)")
    if bias is not None:
        floats = () if out.dtype is torch.int32 else (torch.bfloat16, torch.float32)
        require_dtype(QUANT, "bias", bias, (torch.int32, *floats))
        require(bias.size == (columns,), QUANT, f"bias must have shape ({columns},)")


def integer_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """int8 @ int8 with an exact sum, as int32."""
    exact = torch.float32 if x.shape[-1] <= EXACT_IN_FLOAT32 else torch.float64
    return torch.matmul(x.to(exact), weight.to(exact)).to(torch.int32)


GROUP = 256
MAX_GROUPED_INPUTS = 29576
LEFT_OUT = 8
CODES_A_WORD = 8


@cache
def check_grouped(
    x: Layout,
    weight: Layout,
    token: Layout | None,
    scale: Layout,
    offset: Layout | None,
    group: int,
    out: Layout,
) -> None:
    """int8 by int4 in groups (aclnn_quant_matmul_v5.cpp and quant_batch_matmul_v4_msd_tiling.cpp of
    ops-nn, and aclnnQuantMatmulV5.md: K-G for A2 and A3)."""
    require_a2_or_a3(QUANT)
    require(x.dims == weight.dims == 2, QUANT, "beside int4 weights x1 and x2 must have 2 dims")
    rows, inputs = x.size
    columns = weight.size[1] * CODES_A_WORD
    require(inputs == weight.size[0], QUANT, f"inner dims differ: {x} and {weight}")
    require(not weight.nz, QUANT, "an int4 weight with groups must be in format ND, not NZ")
    require_contiguous(QUANT, x1=x, x2=weight)
    require(group == GROUP, QUANT, f"group_sizes of int4 weights must be [0, 0, {GROUP}]")
    require(inputs % GROUP == 0, QUANT, f"K must be a multiple of {GROUP}, not {inputs}")
    rule = f"K of an int4 weight may be {MAX_GROUPED_INPUTS} at most, not {inputs}"
    require(inputs <= MAX_GROUPED_INPUTS, QUANT, rule)
    require_dtype(QUANT, "scale", scale, (torch.int64, torch.uint64))
    require_shape(QUANT, "scale", scale, (inputs // GROUP, columns))
    require(token is not None, QUANT, "int4 weights need pertoken_scale")
    if token is not None:
        require_dtype(QUANT, "pertoken_scale", token, (torch.float32,))
        require_shape(QUANT, "pertoken_scale", token, (rows, 1))
    require(offset is not None, QUANT, "int4 weights need an offset")
    if offset is not None:
        require_dtype(QUANT, "offset", offset, (torch.float32,))
        require_shape(QUANT, "offset", offset, (columns,))
    require_dtype(QUANT, "the output", out, (torch.bfloat16, torch.float16))


def unpacked(words: torch.Tensor) -> torch.Tensor:
    """Eight signed 4-bit codes of each int32, the first in the lowest bits."""
    fields = words.unsqueeze(-1) >> torch.arange(0, 32, 4, dtype=torch.int32)
    return ((fields & 15) ^ 8).sub_(8).flatten(-2)


def split_codes(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The high and the low half of int8 codes, int32; of the low one without LEFT_OUT."""
    high = torch.div(codes.int(), 16, rounding_mode="floor")
    return high, codes.int() - 16 * high - LEFT_OUT


def group_sums(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """int8 codes [M, K] by int4 [K, N] under float32 scales [K / 256, N]: of each half of a code
    the products of a group leave the cube unit as float16, scaled, and are added to those of the
    groups before it in float16. How the two roundings are done is not said; here it is to the
    nearest, halves to even. float32 [M, N], without LEFT_OUT."""

    def summed(half: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(half.shape[0], weight.shape[1], dtype=torch.float16)
        groups = zip(half.split(GROUP, 1), weight.split(GROUP), scales, strict=True)
        for part, rows, factor in groups:
            total += (integer_product(part, rows).float() * factor).half()
        return total.float()

    high, low = split_codes(x)
    return 16 * summed(high) + summed(low)


def plan_grouped(
    x: DeviceTensor,
    weight: DeviceTensor,
    token: DeviceTensor | None,
    scale: DeviceTensor,
    offset: DeviceTensor | None,
    bias: DeviceTensor | None,
    group: int,
    out: DeviceTensor,
) -> Callable[[], None]:
    """quant_batch_matmul_v4_msd.h: see group_sums; `offset` brings back what they leave out."""
    check_grouped(
        x.layout,
        weight.layout,
        token and token.layout,
        scale.layout,
        offset and offset.layout,
        group,
        out.layout,
    )
    require(bias is None, QUANT, "int4 weights take no bias")

    def run() -> None:
        assert token is not None and offset is not None
        scales = scale.read().view(torch.int64).to(torch.int32).view(torch.float32)
        sums = group_sums(x.read(), unpacked(weight.read()), scales)
        out.write((sums + offset.read()) * token.read())

    return run


@aclnn(
    "aclnnQuantMatmulV5",
    "x:T weight:T token:T channel:T y_scale:T x_offset:T weight_offset:T y_offset:T bias:T "
    "transpose_x:b transpose_weight:b group:i out:T",
)
@aclnn(
    "aclnnQuantMatmulWeightNz",
    "x:T weight:T token:T channel:T y_scale:T x_offset:T weight_offset:T y_offset:T bias:T "
    "transpose_x:b transpose_weight:b group:i out:T",
)
def quant_matmul(
    x: DeviceTensor,
    weight: DeviceTensor,
    token: DeviceTensor | None,
    channel: DeviceTensor,
    y_scale: DeviceTensor | None,
    x_offset: DeviceTensor | None,
    weight_offset: DeviceTensor | None,
    y_offset: DeviceTensor | None,
    bias: DeviceTensor | None,
    transpose_x: bool,
    transpose_weight: bool,
    group: int,
    out: DeviceTensor,
) -> Callable[[], None]:
    if weight.layout.dtype is torch.int32 and x.layout.dtype is torch.int8:
        return plan_grouped(x, weight, token, channel, y_offset, bias, group, out)
    check_quant_operands(x.layout, weight.layout, out.layout)
    check_quant_scales(
        x.layout,
        weight.layout,
        token and token.layout,
        channel.layout,
        bias and bias.layout,
        out.layout,
    )
    given = [each for each in (y_scale, weight_offset) if each is not None and each.layout.elements]
    require(not given and group == 0, QUANT, "y_scale, offset and group_sizes are not simulated")

    def run() -> None:
        total = integer_product(x.read(), weight.read())
        if bias is not None and bias.layout.dtype is torch.int32:
            total = total + bias.read()
        if out.layout.dtype is torch.int32:
            out.write(total)  # the raw sum: the scales are applied by a later operator
            return
        result = total.float()
        if token is not None:
            result = result * token.read().unsqueeze(-1)
        result = result * channel.read().float()
        if bias is not None and bias.layout.dtype is not torch.int32:
            result = result + bias.read().float()
        out.write(result)

    return run


@aclnn(
    "aclnnQuantMatmulV4",
    "x:T weight:T channel:T offset:T token:T bias:T transpose_x:b transpose_weight:b out:T",
)
def quant_matmul_v4(
    x: DeviceTensor,
    weight: DeviceTensor,
    channel: DeviceTensor,
    offset: DeviceTensor | None,
    token: DeviceTensor | None,
    bias: DeviceTensor | None,
    transpose_x: bool,
    transpose_weight: bool,
    out: DeviceTensor,
) -> Callable[[], None]:
    """What wheels for CANN 8 ask for, where newer ones ask for V5."""
    nothing = (None, None, offset, None)
    transposed = (transpose_x, transpose_weight)
    return quant_matmul(x, weight, token, channel, *nothing, bias, *transposed, 0, out)


# ------------------------------------------------------------------------- _npu_matmul_add_fp32
@cache
def check_matmul_add(x: Layout, weight: Layout, total: Layout) -> None:
    operator = "_npu_matmul_add_fp32"
    require_a2_or_a3(operator)
    require_dtype(operator, "x", x, (torch.float16, torch.bfloat16))
    require(weight.dtype is x.dtype, operator, "x and weight must have one dtype")
    require_dtype(operator, "C", total, (torch.float32,))
    fits = x.dims == weight.dims == 2 and x.size[0] == weight.size[0]
    require(fits, operator, f"x {x.size} and weight {weight.size} must be matrices of equal rows")
    require_shape(operator, "C", total, (x.size[1], weight.size[1]))
    require_contiguous(operator, C=total)  # what it writes is not copied back
    require_nd(operator, x=x, weight=weight, C=total)


@atb("_npu_matmul_add_fp32")
def matmul_add(x: DeviceTensor, weight: DeviceTensor, total: DeviceTensor) -> Callable[[], None]:
    """C + x.T @ weight, in place: LinearParam with transposeA and enAccum."""
    check_matmul_add(x.layout, weight.layout, total.layout)
    return lambda: total.write(total.read() + x.read().float().mT @ weight.read().float())
