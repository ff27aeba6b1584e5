"""Products of the experts of a mixture, each with its own rows: npu_grouped_matmul and
npu_grouped_matmul_swiglu_quant (_v2). One weight [experts, K, N], rows in the order of the experts.

Demands: aclnn_grouped_matmul.cpp and aclnnGroupedMatmulWeightNz.md, gmm_dsq_base.h and
aclnnGroupedMatmulSwigluQuantWeightNzV2.md of ops-transformer. Both make strided arguments in lists
contiguous by a copy; of a weight that would be all of it, and is refused here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch

from .. import nz
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
from .gated import swiglu_values
from .grouped_codes import (
    Product,
    antiquant_product,
    check_antiquant,
    check_int4,
    int4_product,
    leave_halves,
)
from .matmul import MAX_INNER, float_product, integer_product, require_storage

Run = Callable[[], None]
Tensors = list[DeviceTensor | None] | None

HALF = (torch.float16, torch.bfloat16)
CUMULATIVE, COUNTS = 0, 1
MAX_GROUPS = 1024


def present(tensors: Tensors) -> list[DeviceTensor]:
    """An empty list, and one of empty tensors, means that there is none (ResetEmptyTensor)."""
    return [each for each in tensors or [] if each is not None and each.layout.elements]


def single(operator: str, name: str, tensors: Tensors) -> DeviceTensor:
    found = present(tensors)
    require(len(found) == 1, operator, f"only one tensor as {name} is simulated")
    return found[0]


def swapped(weight: Layout) -> bool:
    """IsTransposeLastTwoDims: a dense [E, N, K] seen as [E, K, N]."""
    _, inputs, outputs = weight.size
    return weight.stride == (inputs * outputs, 1, inputs)


@cache
def check_groups(operator: str, groups: Layout, experts: int, list_type: int) -> None:
    """CheckGroupListCommonTensor; of counts the pages say that there must not be just one."""
    require_dtype(operator, "group_list", groups, (torch.int64,))
    require_shape(operator, "group_list", groups, (experts,))
    require(experts <= MAX_GROUPS, operator, f"there may be {MAX_GROUPS} groups at most")
    require(list_type in (CUMULATIVE, COUNTS), operator, "group_list_type must be 0 or 1 here")
    rule = "group_list must not have one element if group_list_type is 1"
    require(list_type == CUMULATIVE or experts > 1, operator, rule)


def rows_of_experts(
    operator: str, groups: DeviceTensor, list_type: int, rows: int, every_row: bool
) -> Iterator[tuple[int, slice]]:
    """Experts that have rows, and which. `every_row` demands that no row is left over."""
    listed = groups.read()
    counts = listed if list_type == COUNTS else listed.diff(prepend=torch.zeros(1).long())
    require(bool((counts >= 0).all()), operator, "group_list must not tell negative counts")
    total = int(counts.sum())
    fits = total == rows if every_row else total <= rows
    require(fits, operator, f"group_list tells {total} rows, x has {rows}")
    start = 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            yield expert, slice(start, start + count)
        start += count


def weight_of(weight: DeviceTensor, expert: int) -> torch.Tensor:
    """[K, N] of one expert."""
    if not weight.layout.nz:
        return weight.view()[expert]
    rows, columns = weight.layout.size[1:]
    tiles = weight.blocks()[expert]
    if swapped(weight.layout):
        return nz.unpack(tiles, columns, rows).mT
    return nz.unpack(tiles, rows, columns)


# ------------------------------------------------------------------------------ npu_grouped_matmul
GROUPED = "npu_grouped_matmul"


@cache
def check_grouped_operands(x: Layout, weight: Layout, out: Layout) -> None:
    """SplitMSingleXSingleWeightSingleY and TransWeightToNz of aclnn_grouped_matmul.cpp, which take
    transposed views of weights in either format."""
    require_a2_or_a3(GROUPED)
    require_nd(GROUPED, x=x)
    require_contiguous(GROUPED, x=x)
    require(x.dims == 2 and weight.dims == 3, GROUPED, "x must have 2 dims and weight 3")
    require(x.size[1] == weight.size[1], GROUPED, f"inner dims differ: {x} and {weight}")
    rule = "weight must be contiguous or a transposed view"
    require(weight.contiguous or swapped(weight), GROUPED, rule)
    inner = max(x.size[1], 0 if swapped(weight) else weight.size[2])
    rule = f"an innermost dim may be {MAX_INNER} at most, not {inner}"
    require(inner <= MAX_INNER, GROUPED, rule)
    if x.dtype is torch.int8:
        require_dtype(GROUPED, "weight beside int8", weight, (torch.int8,))
        require_dtype(GROUPED, "the output", out, HALF)
    else:
        require_dtype(GROUPED, "x", x, HALF)
        require(weight.dtype is x.dtype, GROUPED, f"dtypes differ: {x} and {weight}")
        require(out.dtype is x.dtype, GROUPED, "the output must have the dtype of x")
    if weight.nz:
        require_whole_tiles(GROUPED, weight)
        require_storage(GROUPED, weight)


def require_whole_tiles(operator: str, weight: Layout) -> None:
    """TransWeightToNz: nothing of the tiles may be padding."""
    *_, rows, columns = weight.size
    stored = (columns, rows) if swapped(weight) else (rows, columns)
    wanted = (nz.ROWS, nz.strip_columns(weight.dtype))
    fits = all(size % whole == 0 for size, whole in zip(stored, wanted, strict=True))
    rule = f"an NZ weight stored as {stored} must have multiples of {wanted}"
    require(fits, operator, rule)


@cache
def check_grouped_scales(
    x: Layout, weight: Layout, scale: Layout, token: Layout, out: Layout
) -> None:
    """CheckQuantParamsDtype, CheckPerTokenScale, CheckOptionalTensorList."""
    wanted = torch.bfloat16 if out.dtype is torch.bfloat16 else torch.float32
    rule = f"scale {scale.dtype} does not go with output {out.dtype}"
    require(scale.dtype is wanted, GROUPED, rule)
    require_shape(GROUPED, "scale", scale, (weight.size[0], weight.size[2]))
    require_dtype(GROUPED, "per_token_scale", token, (torch.float32,))
    require_shape(GROUPED, "per_token_scale", token, x.size[:1])


LISTS = (
    "x:L weight:L bias:L scale:L offset:L antiquant_scale:L antiquant_offset:L token:L groups:T "
    "act_input:L act_scale:L act_offset:L split:i group_type:i list_type:i act_type:i "
)
OUTPUTS = "out:L act_out:L dynamic_scale:L"


def only(tensors: Tensors) -> DeviceTensor | None:
    """The one tensor of a list that may be left out."""
    found = present(tensors)
    require(len(found) <= 1, GROUPED, "only one tensor of each kind is simulated")
    return found[0] if found else None


@aclnn("aclnnGroupedMatmulWeightNz", LISTS + "tuning:I group_size:i " + OUTPUTS)
def grouped_matmul_weight_nz(*arguments: Any) -> Run:
    require(single(GROUPED, "weight", arguments[1]).layout.nz, GROUPED, "the weight must be NZ")
    return plan_grouped(*arguments)


@aclnn("aclnnGroupedMatmulV5", LISTS + "tuning:I " + OUTPUTS)
@aclnn("aclnnGroupedMatmulV4", LISTS + OUTPUTS)
def grouped_matmul(*arguments: Any) -> Run:
    weight = single(GROUPED, "weight", arguments[1]).layout
    require(not weight.nz, GROUPED, "an NZ weight needs aclnnGroupedMatmulWeightNz")
    return plan_grouped(*arguments)


def plan_grouped(
    x_list: Tensors,
    weight_list: Tensors,
    bias: Tensors,
    scale_list: Tensors,
    offset: Tensors,
    antiquant_scale: Tensors,
    antiquant_offset: Tensors,
    token_list: Tensors,
    groups: DeviceTensor | None,
    act_input: Tensors,
    act_scale: Tensors,
    act_offset: Tensors,
    split: int,
    group_type: int,
    list_type: int,
    act_type: int,
    *rest: Any,
) -> Run:
    """Of int8: grouped_matmul_quant_mixcore.h multiplies the int32 sum with the scale of the output
    first, then with that of the token, in float32, and rounds once, halves to even."""
    *_, out_list, _act_out, _dynamic_scale = rest
    x, weight = single(GROUPED, "x", x_list), single(GROUPED, "weight", weight_list)
    out = single(GROUPED, "the output", out_list)
    unused = (offset, act_input, act_scale, act_offset)
    rule = "offset and activations are not simulated"
    require(act_type == 0 and not any(map(present, unused)), GROUPED, rule)
    require(group_type == 0, GROUPED, "only grouped rows (group_type=0) are simulated")
    require(split in (2, 3), GROUPED, "one output means that split_item is 2 or 3")
    require(groups is not None, GROUPED, "group_list is needed")
    assert groups is not None
    check_groups(GROUPED, groups.layout, weight.layout.size[0], list_type)
    added, scale, token = only(bias), only(scale_list), only(token_list)
    decoding = only(antiquant_scale), only(antiquant_offset)
    codes = weight.layout.dtype in (torch.int8, torch.int32)
    product: Product
    if x.layout.dtype is torch.int8 and weight.layout.dtype is torch.int32:
        require(decoding == (None, None), GROUPED, "int8 rows take no antiquantization")
        layouts = (each and each.layout for each in (scale, added, token))
        check_int4(x.layout, weight.layout, *layouts, list_type, out.layout)
        assert scale is not None and added is not None and token is not None
        product = int4_product(x, weight, scale, added, token)
    elif x.layout.dtype is not torch.int8 and codes:
        rule = "a weight of codes beside floats takes no scale, per_token_scale or bias here"
        require((scale, token, added) == (None, None, None), GROUPED, rule)
        layouts = (each and each.layout for each in decoding)
        check_antiquant(x.layout, weight.layout, *layouts, out.layout)
        assert decoding[0] is not None and decoding[1] is not None
        product = antiquant_product(x, weight, decoding[0], decoding[1])
    else:
        rule = "bias and antiquantization are not simulated here"
        require((added, *decoding) == (None, None, None), GROUPED, rule)
        product = plain_product(x, weight, scale, token, out)

    def run() -> None:
        count = x.layout.size[0]
        for expert, rows in rows_of_experts(GROUPED, groups, list_type, count, every_row=True):
            out.view()[rows] = product(expert, rows).to(out.layout.dtype)
        if x.layout.dtype is torch.int8 and weight.layout.dtype is torch.int32:
            leave_halves(x)

    return run


def plain_product(
    x: DeviceTensor,
    weight: DeviceTensor,
    scale: DeviceTensor | None,
    token: DeviceTensor | None,
    out: DeviceTensor,
) -> Product:
    """Floats by floats, or int8 by int8."""
    check_grouped_operands(x.layout, weight.layout, out.layout)
    if x.layout.dtype is not torch.int8:
        rule = "floats take no scale and no per_token_scale"
        require((scale, token) == (None, None), GROUPED, rule)
        return lambda expert, rows: float_product(x.view()[rows], weight_of(weight, expert))
    rule = "int8 rows without scale or per_token_scale are not simulated"
    require(scale is not None and token is not None, GROUPED, rule)
    assert scale is not None and token is not None
    layouts = (weight.layout, scale.layout, token.layout, out.layout)
    check_grouped_scales(x.layout, *layouts)

    def product(expert: int, rows: slice) -> torch.Tensor:
        sums = integer_product(x.view()[rows], weight_of(weight, expert)).float()
        return sums * scale.read()[expert].float() * token.read()[rows].unsqueeze(-1)

    return product


# -------------------------------------------------------------- npu_grouped_matmul_swiglu_quant_v2
MAX_GATED_OUTPUTS = 10240
MAX_GATED_INPUTS = 65535


@cache
def check_gated(operator: str, x: Layout, weight: Layout, scale: Layout, token: Layout) -> None:
    """gmm_dsq_base.h, A8W8: CheckInputOutShapeA8W8, CheckSingleTensorListTypeA8W8, CheckFormat.
    The page excludes transposed weights, the code does not look."""
    require_a2_or_a3(operator)
    require_nd(operator, x=x)
    require_dtype(operator, "x", x, (torch.int8,))
    require_dtype(operator, "weight", weight, (torch.int8,))
    require(x.dims == 2 and weight.dims == 3, operator, "x must have 2 dims and weight 3")
    require(x.size[1] == weight.size[1], operator, f"inner dims differ: {x} and {weight}")
    require(weight.nz, operator, "an int8 weight must be in format NZ, not ND")
    require(weight.contiguous, operator, "an int8 weight must not be transposed")
    require_whole_tiles(operator, weight)
    require_storage(operator, weight)
    experts, inputs, outputs = weight.size
    rule = f"N may be {MAX_GATED_OUTPUTS} at most, not {outputs}"
    require(outputs <= MAX_GATED_OUTPUTS, operator, rule)
    rule = f"K may be {MAX_GATED_INPUTS} at most, not {inputs}"
    require(inputs <= MAX_GATED_INPUTS, operator, rule)
    require_dtype(operator, "weight_scale", scale, (torch.float32, *HALF))
    require_shape(operator, "weight_scale", scale, (experts, outputs))
    require_dtype(operator, "x_scale", token, (torch.float32,))
    require_shape(operator, "x_scale", token, x.size[:1])


def requantized(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """grouped_matmul_swiglu_quant.h, Quant: scale = max|row| / 127; values * (1 / scale), rounded
    to float16 and then to int8, halves to even both times (CastFp32ToInt8Template). So 101.47 is
    102, where npu_dynamic_quant says 101."""
    scale = values.abs().amax(-1) / 127
    reciprocal = (1 / scale).masked_fill(scale == 0, 0.0).unsqueeze(-1)
    return torch.round((values * reciprocal).half().float()), scale


def plan_gated(
    operator: str,
    x: DeviceTensor,
    weight: DeviceTensor,
    scale: DeviceTensor,
    token: DeviceTensor,
    groups: DeviceTensor,
    list_type: int,
    codes: DeviceTensor,
    out_scale: DeviceTensor,
) -> Run:
    """(sum * token scale) * channel scale, then the gate, all in float32 (customDataCopyIn, Dequant
    and Swiglu of grouped_matmul_swiglu_quant.h). Rows of no expert are left as they are."""
    check_gated(operator, x.layout, weight.layout, scale.layout, token.layout)
    check_groups(operator, groups.layout, weight.layout.size[0], list_type)

    def run() -> None:
        count = x.layout.size[0]
        for expert, rows in rows_of_experts(operator, groups, list_type, count, every_row=False):
            total = integer_product(x.read()[rows], weight_of(weight, expert)).float()
            values = total * token.read()[rows].float().unsqueeze(-1)
            gated = swiglu_values(values * scale.read()[expert].float(), -1, activate_left=True)
            row_codes, row_scale = requantized(gated)
            codes.view()[rows] = row_codes.to(torch.int8)
            out_scale.view()[rows] = row_scale

    return run


GATED = "npu_grouped_matmul_swiglu_quant_v2"


@aclnn(
    "aclnnGroupedMatmulSwigluQuantV2",
    "x:T weight:L scale:L assist:L bias:T token:T smooth:T groups:T dequant_mode:i dequant_dtype:i "
    "quant_mode:i list_type:i tuning:I codes:T out_scale:T",
)
@aclnn(
    "aclnnGroupedMatmulSwigluQuantWeightNzV2",
    "x:T weight:L scale:L assist:L bias:T token:T smooth:T groups:T dequant_mode:i dequant_dtype:i "
    "quant_mode:i list_type:i tuning:I codes:T out_scale:T",
)
def grouped_matmul_swiglu_quant_v2(
    x: DeviceTensor,
    weights: Tensors,
    scales: Tensors,
    assist: Tensors,
    bias: DeviceTensor | None,
    token: DeviceTensor,
    smooth: DeviceTensor | None,
    groups: DeviceTensor,
    dequant_mode: int,
    dequant_dtype: int,
    quant_mode: int,
    list_type: int,
    tuning: list[int] | None,
    codes: DeviceTensor,
    out_scale: DeviceTensor,
) -> Run:
    """Beside int8 weights the page demands that bias, smooth_scale and weight_assist_matrix are
    not given and that dequant_mode is 0; quant_mode has no other value for A2 and A3."""
    plain = bias is None and smooth is None and not present(assist)
    rule = "int8 weights take no bias, smooth_scale or weight_assist_matrix"
    require(plain, GATED, rule)
    rule = "dequant_mode and quant_mode must be 0 beside int8 weights"
    require(dequant_mode == quant_mode == 0, GATED, rule)
    weight, scale = single(GATED, "weight", weights), single(GATED, "weight_scale", scales)
    return plan_gated(GATED, x, weight, scale, token, groups, list_type, codes, out_scale)


@aclnn(
    "aclnnGroupedMatmulSwigluQuantWeightNZ",
    "x:T weight:T bias:T offset:T scale:T token:T groups:T codes:T out_scale:T out_offset:T",
)
def grouped_matmul_swiglu_quant(
    x: DeviceTensor,
    weight: DeviceTensor,
    bias: DeviceTensor | None,
    offset: DeviceTensor | None,
    scale: DeviceTensor,
    token: DeviceTensor,
    groups: DeviceTensor,
    codes: DeviceTensor,
    out_scale: DeviceTensor,
    out_offset: DeviceTensor | None,
) -> Run:
    """aclnn_grouped_matmul_swiglu_quant.cpp: of a bias or an offset it warns that features and
    accuracy are not guaranteed. Its group_list is cumulative. The scales of its output have the
    dtype of x_scale by the wheel, and must be float32."""
    operator = "npu_grouped_matmul_swiglu_quant"
    require(bias is None and offset is None, operator, "bias and offset are not supported")
    return plan_gated(operator, x, weight, scale, token, groups, CUMULATIVE, codes, out_scale)
