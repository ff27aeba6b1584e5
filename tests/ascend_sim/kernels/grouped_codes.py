"""npu_grouped_matmul with codes that its kernels decode: floats by int8 or int4, int8 by int4.

Demands: aclnn_grouped_matmul.cpp (CheckGroupedMatmulAntiQuant, CheckDimNumAndPerGroupNum,
CheckOptionalTensorList, TransWeightToNz), grouped_matmul_def.cpp and grouped_matmul_tiling.cpp
(A8W4Tiling) of ops-transformer. Offsets, which newer releases do not demand of int4, are demanded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import prod

import torch

from .. import nz, raw
from ..limits import require, require_a2_or_a3, require_contiguous, require_dtype, require_nd
from ..tensors import DeviceTensor, Layout, row_major
from .matmul import GROUP, MAX_INNER, float_product, group_sums, split_codes

GROUPED = "npu_grouped_matmul"
PER_WORD = 8
NZ_OUTPUTS = 64
MAX_INT4_INPUTS = 18432
HALF = (torch.float16, torch.bfloat16)

Product = Callable[[int, slice], torch.Tensor]
"""(expert, its rows) -> the product before it is rounded to the type of the output."""


def logical(weight: Layout) -> tuple[int, int, int]:
    """(E, K, N) of a weight, whose words of int32 hold eight codes."""
    experts, inputs, columns = weight.size
    return experts, inputs, columns * (PER_WORD if weight.dtype is torch.int32 else 1)


def codes_of(weight: DeviceTensor, expert: int) -> torch.Tensor:
    """The integers [K, N] of one expert, int8."""
    layout = weight.layout
    if layout.dtype is torch.int8:
        return weight.view()[expert]
    _, inputs, columns = layout.size
    as_bytes = (inputs, columns * layout.dtype.itemsize)
    size = nz.storage_shape(as_bytes, torch.int8) if layout.nz else as_bytes
    start = layout.offset * layout.dtype.itemsize + expert * prod(size)
    pairs = raw.view(weight.pointer, torch.int8, size, row_major(size), start)
    if layout.nz:
        pairs = nz.unpack(pairs, *as_bytes)
    return torch.stack(((pairs << 4) >> 4, pairs >> 4), dim=-1).flatten(-2)


@cache
def check_operands(x: Layout, weight: Layout, out: Layout) -> None:
    require_a2_or_a3(GROUPED)
    require_nd(GROUPED, x=x)
    require_contiguous(GROUPED, x=x)
    require(x.dims == 2 and weight.dims == 3, GROUPED, "x must have 2 dims and weight 3")
    _, inputs, outputs = logical(weight)
    require(x.size[1] == inputs, GROUPED, f"inner dims differ: {x} and {weight}")
    rule = f"an innermost dim may be {MAX_INNER} at most, not {inputs} and {outputs}"
    require(max(inputs, outputs) <= MAX_INNER, GROUPED, rule)
    require(weight.contiguous, GROUPED, "transposed codes are not simulated")
    require_dtype(GROUPED, "the output", out, HALF)


# ------------------------------------------------------------------------- floats by codes


@cache
def check_antiquant(
    x: Layout, weight: Layout, scale: Layout | None, offset: Layout | None, out: Layout
) -> None:
    check_operands(x, weight, out)
    require(out.dtype is x.dtype, GROUPED, "the output must have the dtype of x")
    rule = "a weight of codes beside floats must be in format ND, not NZ"
    require(not weight.nz, GROUPED, rule)
    rule = "a weight of codes beside floats needs antiquant_scale and antiquant_offset"
    require(scale is not None and offset is not None, GROUPED, rule)
    assert scale is not None and offset is not None
    require_nd(GROUPED, antiquant_scale=scale, antiquant_offset=offset)
    require_dtype(GROUPED, "antiquant_scale", scale, (x.dtype,))
    rule = "antiquant_offset must have the shape and the dtype of antiquant_scale"
    require((offset.size, offset.dtype) == (scale.size, scale.dtype), GROUPED, rule)
    experts, inputs, outputs = logical(weight)
    per_output = scale.size == (experts, outputs)
    in_groups = scale.dims == 3 and scale.size[::2] == (experts, outputs)
    in_groups = in_groups and scale.size[1] > 0 and weight.dtype is torch.int32
    rule = f"antiquant_scale {scale.size} does not belong to the weight {weight.size}"
    require(per_output or in_groups, GROUPED, rule)
    if in_groups:
        rule = f"K {inputs} must be a multiple of the number of groups {scale.size[1]}"
        require(inputs % scale.size[1] == 0, GROUPED, rule)


def splits_rows(x: Layout, weight: Layout) -> bool:
    """Whether the kernel makes two rows of int8 of each row (GMMTiling::Init of
    grouped_matmul_tiling.cpp: A16W8 MSD)."""
    experts, inputs, outputs = logical(weight)
    whole = inputs % 128 == 0 and outputs % 128 == 0
    fits = inputs <= 12288 and outputs >= 1024 and x.size[0] <= 64 * experts
    return weight.dtype is torch.int8 and whole and fits


def antiquant_product(
    x: DeviceTensor, weight: DeviceTensor, scale: DeviceTensor, offset: DeviceTensor
) -> Product:
    """(code + offset) * scale in float32, rounded to the type of x, which the cube unit multiplies
    (grouped_matmul_antiquant.h). Or, with int8 in large shapes, rows of int8 and of what that has
    lost, times the codes, and all else in float32 (grouped_matmul_antiquant_a16w8_msd.h)."""

    def spread(values: DeviceTensor, expert: int) -> torch.Tensor:
        found, inputs = values.read()[expert].float(), x.layout.size[1]
        if values.layout.dims == 2:
            return found
        return found.repeat_interleave(inputs // values.layout.size[1], 0)

    def decoded(expert: int, rows: slice) -> torch.Tensor:
        codes = codes_of(weight, expert).float() + spread(offset, expert)
        factors = (codes * spread(scale, expert)).to(x.layout.dtype)
        return float_product(x.view()[rows], factors)

    def split(expert: int, rows: slice) -> torch.Tensor:
        values = x.view()[rows].float()
        largest = values.abs().amax(-1, keepdim=True)
        steps = torch.where(largest > 0, values * (127 / largest), 0.0)
        high = steps.round()
        low = (254 * (steps - high)).round()
        codes = codes_of(weight, expert).double()
        high_sums, low_sums = ((part.double() @ codes).float() for part in (high, low))
        sums = (high_sums + low_sums * (1 / 254)) * (largest / 127)
        sums += spread(offset, expert) * values.sum(-1, keepdim=True)
        return sums * spread(scale, expert)

    return split if splits_rows(x.layout, weight.layout) else decoded


# -------------------------------------------------------------------------- int8 by int4


@cache
def check_int4(
    x: Layout,
    weight: Layout,
    scale: Layout | None,
    bias: Layout | None,
    token: Layout | None,
    list_type: int,
    out: Layout,
) -> None:
    check_operands(x, weight, out)
    experts, inputs, outputs = logical(weight)
    if weight.nz:
        rule = f"an int4 NZ weight must have multiples of 16 and {NZ_OUTPUTS}, not {weight.size}"
        require(inputs % nz.ROWS == 0 and outputs % NZ_OUTPUTS == 0, GROUPED, rule)
        nbytes = experts * prod(nz.storage_shape((inputs, outputs // 2), torch.int8))
        held = prod(weight.storage_size)
        rule = f"the NZ storage {weight.storage_size} does not belong to the weight {weight.size}"
        require(nbytes in (held, held * weight.dtype.itemsize), GROUPED, rule)
    rule = f"K of int4 may be {MAX_INT4_INPUTS} at most, not {inputs}"
    require(inputs <= MAX_INT4_INPUTS, GROUPED, rule)
    require(inputs % GROUP == 0, GROUPED, f"K must be a multiple of {GROUP}, not {inputs}")
    given = scale is not None and bias is not None and token is not None
    require(given, GROUPED, "int4 beside int8 needs scale, bias and per_token_scale")
    assert scale is not None and bias is not None and token is not None
    require_dtype(GROUPED, "scale", scale, (torch.int64, torch.uint64))
    wanted = (experts, inputs // GROUP, outputs)
    require(scale.size == wanted, GROUPED, f"scale must have shape {wanted}, not {scale.size}")
    require_dtype(GROUPED, "bias", bias, (torch.float32,))
    wanted_bias = (experts, outputs)
    require(bias.size == wanted_bias, GROUPED, f"bias must have shape {wanted_bias}")
    require_dtype(GROUPED, "per_token_scale", token, (torch.float32,))
    require(token.elements == x.size[0], GROUPED, "per_token_scale must have a value for each row")
    require(list_type == 1, GROUPED, "beside int4 group_list is read as counts, whatever it says")


def int4_product(
    x: DeviceTensor,
    weight: DeviceTensor,
    scale: DeviceTensor,
    bias: DeviceTensor,
    token: DeviceTensor,
) -> Product:
    """As npu_quant_matmul has it (grouped_matmul_antiquant_a8w4_msd.h)."""

    def product(expert: int, rows: slice) -> torch.Tensor:
        factors = scale.read()[expert].view(torch.int64).to(torch.int32).view(torch.float32)
        sums = group_sums(x.view()[rows], codes_of(weight, expert).int(), factors)
        tokens = token.read().flatten()[rows].unsqueeze(-1)
        return (sums + bias.read()[expert]) * tokens

    return product


def leave_halves(x: DeviceTensor) -> None:
    """What is left of the rows: they are split where they lie, two halves of four bits behind each
    other (GMM_CV_SPLIT_IMP_A8W4_MSD of grouped_matmul.cpp)."""
    values = x.view()
    halves = torch.stack(split_codes(values), dim=1)
    pairs = (halves[..., 0::2] & 15) | (halves[..., 1::2] << 4)
    values.copy_(pairs.to(torch.uint8).view(torch.int8).view(values.shape))
