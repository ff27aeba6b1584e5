"""npu_weight_quant_batchmatmul: floats times int8 or int4 weights, which are decoded on the way.

What is refused is in op-plugin's documentation of it, in that of aclnnWeightQuantBatchMatmulV2 and
V3, and in the checks of ops-nn's aclnn_weight_quant_batch_matmul_v2.cpp. op-plugin's says of
FRACTAL_NZ that only graphs take it, which neither of the others does; vllm-ascend calls it eagerly.

The decoded weight is rounded to the type of x before it is multiplied, as in ops-nn's
wqbmmv2_kernel_golden.py: the cube unit takes no other. inner_precise 1 computes the same here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import prod

import torch

from .. import nz, raw
from ..doors.aclnn import aclnn
from ..limits import require, require_a2_or_a3, require_dtype, require_nd
from ..tensors import DeviceTensor, Layout, row_major
from .matmul import float_product, require_storage

OPERATOR = "npu_weight_quant_batchmatmul"
MOST = 65535
PER_WORD = 8
NZ_GROUPS = (64, 128)
NZ_OUTPUTS = 64
LEAST_GROUP = 32


def logical(weight: Layout) -> tuple[int, int]:
    """(K, N) of a weight, whose words hold eight codes along the last axis that was stored."""
    rows, columns = weight.size
    if weight.dtype is not torch.int32:
        return rows, columns
    return (rows * PER_WORD, columns) if weight.transposed else (rows, columns * PER_WORD)


@cache
def check_operands(x: Layout, weight: Layout, group: int, out: Layout) -> None:
    require_a2_or_a3(OPERATOR)
    require_dtype(OPERATOR, "x", x, (torch.float16, torch.bfloat16))
    require_dtype(OPERATOR, "weight", weight, (torch.int8, torch.int32))
    require(x.dims == weight.dims == 2, OPERATOR, "x and weight must be matrices")
    require_nd(OPERATOR, x=x)
    for name, layout in (("x", x), ("weight", weight)):
        rule = f"{name} must be contiguous or a transposed view"
        require(layout.contiguous or layout.transposed, OPERATOR, rule)
    inputs, outputs = logical(weight)
    require(x.size[1] == inputs, OPERATOR, f"inner dims differ: {x} and {weight}")
    rule = f"K and N may be {MOST} at most, not {inputs} and {outputs}"
    require(max(inputs, outputs) <= MOST, OPERATOR, rule)
    require(not x.transposed or x.size[0] <= MOST, OPERATOR, f"M of a transposed x: {x.size[0]}")
    require(out.dtype is x.dtype, OPERATOR, "int8 output is not simulated")
    rule = f"the group must be 0 or a multiple of 32 from 32 to K - 1 = {inputs - 1}, not {group}"
    fits = LEAST_GROUP <= group < inputs and group % LEAST_GROUP == 0
    require(group == 0 or fits, OPERATOR, rule)


@cache
def check_nz(x: Layout, weight: Layout, scale: Layout, group: int) -> None:
    require(min(weight.size) > 1, OPERATOR, "an NZ weight must not have a dim of 1")
    if weight.dtype is torch.int8:
        require(group == 0, OPERATOR, "an int8 NZ weight has a scale for each output")
        require_storage(OPERATOR, weight)
    else:
        check_int4_nz(x, weight, scale, group)


def check_int4_nz(x: Layout, weight: Layout, scale: Layout, group: int) -> None:
    rule = "an int4 NZ weight with a scale for each output must be a transposed view"
    require(group or weight.transposed, OPERATOR, rule)
    require(group or scale.elements > 1, OPERATOR, "an int4 NZ weight has no scale for all of it")
    if group:
        rule = "x and an int4 NZ weight in groups must not be transposed"
        require(not x.transposed and not weight.transposed, OPERATOR, rule)
        rule = f"groups of an int4 NZ weight are 64 or 128, not {group}"
        require(group in NZ_GROUPS, OPERATOR, rule)
        inputs, outputs = logical(weight)
        rule = f"the K of an int4 NZ weight must be a multiple of the group {group}, not {inputs}"
        require(inputs % group == 0, OPERATOR, rule)
        rule = f"the N of an int4 NZ weight in groups must be a multiple of 64, not {outputs}"
        require(outputs % NZ_OUTPUTS == 0, OPERATOR, rule)
    # npu_convert_weight_to_int4pack states the storage in words, a view of int8 in bytes: the
    # operator multiplies the last dim by eight and looks no further (SetShapeStrideForNZ).
    rows, columns = weight.size[::-1] if weight.transposed else weight.size
    nbytes = prod(nz.storage_shape((rows, columns * weight.dtype.itemsize), torch.int8))
    rule = f"the NZ storage {weight.storage_size} does not belong to the weight {weight.size}"
    held = prod(weight.storage_size)
    require(nbytes in (held, held * weight.dtype.itemsize), OPERATOR, rule)


@cache
def check_scales(
    x: Layout, weight: Layout, scale: Layout, offset: Layout | None, group: int
) -> None:
    inputs, outputs = logical(weight)
    rule = f"antiquant_scale must have the dtype of x, {x.dtype}, not {scale.dtype}"
    require(scale.dtype is x.dtype, OPERATOR, rule)
    require_nd(OPERATOR, antiquant_scale=scale, antiquant_offset=offset)
    allowed: tuple[tuple[int, ...], ...] = ((1,), (1, 1), (outputs,), (1, outputs))
    if group:
        allowed = ((-(-inputs // group), outputs),)
    rule = f"antiquant_scale must have one of the shapes {allowed}, not {scale.size}"
    require(scale.size in allowed, OPERATOR, rule)
    if weight.transposed and group:  # the device takes it for a view of [N, K / group]
        rule = "antiquant_scale of a transposed weight in groups must be a transposed view"
        require(scale.transposed or 1 in scale.size, OPERATOR, rule)
    else:
        require(scale.contiguous, OPERATOR, "antiquant_scale must be contiguous")
    if offset is not None:
        rule = "antiquant_offset must have the shape and the dtype of antiquant_scale"
        require((offset.size, offset.dtype) == (scale.size, scale.dtype), OPERATOR, rule)


@cache
def check_bias(x: Layout, weight: Layout, bias: Layout | None) -> None:
    if bias is None:
        return
    wanted = torch.float32 if x.dtype is torch.bfloat16 else torch.float16
    require_dtype(OPERATOR, "bias", bias, (wanted,))
    _, outputs = logical(weight)
    rule = f"bias must have shape ({outputs},) or (1, {outputs}), not {bias.size}"
    require(bias.size in ((outputs,), (1, outputs)), OPERATOR, rule)
    require(bias.contiguous, OPERATOR, "bias must be contiguous")


def codes_of(weight: DeviceTensor) -> torch.Tensor:
    """The integers [K, N] of a weight, int8."""
    layout = weight.layout
    if layout.dtype is torch.int8:
        return weight.read()
    words = layout.size[::-1] if layout.transposed else layout.size
    as_bytes = (words[0], words[1] * layout.dtype.itemsize)
    size = nz.storage_shape(as_bytes, torch.int8) if layout.nz else as_bytes
    start = layout.offset * layout.dtype.itemsize
    pairs = raw.view(weight.pointer, torch.int8, size, row_major(size), start)
    if layout.nz:
        pairs = nz.unpack(pairs, *as_bytes)
    codes = torch.stack(((pairs << 4) >> 4, pairs >> 4), dim=-1).flatten(-2)
    return codes.mT if layout.transposed else codes


def decoded(
    weight: DeviceTensor, scale: DeviceTensor, offset: DeviceTensor | None, group: int
) -> torch.Tensor:
    """(code + offset) * scale [K, N], in the type of the scales: each rounded once."""
    codes = codes_of(weight).to(scale.layout.dtype)

    def spread(values: torch.Tensor) -> torch.Tensor:
        return values.repeat_interleave(group, 0)[: len(codes)] if group else values

    shifted = codes if offset is None else codes + spread(offset.read())
    return shifted * spread(scale.read())


@aclnn(
    "aclnnWeightQuantBatchMatmulV3",
    "x:T weight:T scale:T offset:T quant_scale:T quant_offset:T bias:T group:i precise:i out:T",
)
def weight_quant_matmul(
    x: DeviceTensor,
    weight: DeviceTensor,
    scale: DeviceTensor,
    offset: DeviceTensor | None,
    quant_scale: DeviceTensor | None,
    quant_offset: DeviceTensor | None,
    bias: DeviceTensor | None,
    group: int,
    precise: int,
    out: DeviceTensor,
) -> Callable[[], None]:
    group &= 0xFFFFFFFF  # a C int in a register of 64 bits
    check_operands(x.layout, weight.layout, group, out.layout)
    if weight.layout.nz:
        check_nz(x.layout, weight.layout, scale.layout, group)
    check_scales(x.layout, weight.layout, scale.layout, offset and offset.layout, group)
    check_bias(x.layout, weight.layout, bias and bias.layout)
    rule = "quantized output is not simulated"
    require(quant_scale is None and quant_offset is None, OPERATOR, rule)
    require(precise & 0xFFFFFFFF in (0, 1), OPERATOR, "inner_precise must be 0 or 1")

    def run() -> None:
        weights = decoded(weight, scale, offset, group)
        out.write(float_product(x.read(), weights, None if bias is None else bias.read()))

    return run


@aclnn(
    "aclnnWeightQuantBatchMatmulV2",
    "x:T weight:T scale:T offset:T quant_scale:T quant_offset:T bias:T group:i out:T",
)
def weight_quant_matmul_v2(
    x: DeviceTensor,
    weight: DeviceTensor,
    scale: DeviceTensor,
    offset: DeviceTensor | None,
    quant_scale: DeviceTensor | None,
    quant_offset: DeviceTensor | None,
    bias: DeviceTensor | None,
    group: int,
    out: DeviceTensor,
) -> Callable[[], None]:
    """What torch_npu asks for unless inner_precise is 1."""
    quant = (quant_scale, quant_offset)
    return weight_quant_matmul(x, weight, scale, offset, *quant, bias, group, 0, out)
