"""Copies, fills, casts, pointwise arithmetic and gathering: plain torch semantics, no limits of
their own.  Most are rows of a table: the operator's name and the torch function it means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..doors.aclnn import aclnn
from ..limits import require
from ..tensors import DeviceTensor

Run = Callable[[], None]
Function = Callable[..., Any]


def table(signature: str, functions: dict[str, Function]) -> None:
    """Operators whose last argument is the output and whose others are the function's."""
    for name, function in functions.items():
        aclnn(name, signature)(_pointwise(function))


def _pointwise(function: Function) -> Callable[..., Run]:
    def plan(*arguments: Any) -> Run:
        *inputs, out = arguments
        return lambda: out.write(function(*(_value(value) for value in inputs)))

    return plan


def in_place(signature: str, functions: dict[str, Function]) -> None:
    """Operators that write their first argument."""
    for name, function in functions.items():
        aclnn(name, signature)(_overwriting(function))


def _overwriting(function: Function) -> Callable[..., Run]:
    def plan(target: DeviceTensor, *others: object) -> Run:
        return lambda: target.write(function(target.read(), *(_value(v) for v in others)))

    return plan


def _value(argument: object) -> object:
    return argument.read() if isinstance(argument, DeviceTensor) else argument


def scaled_add(a: torch.Tensor, b: torch.Tensor | float, alpha: float) -> torch.Tensor:
    return torch.add(a, b, alpha=alpha)


def scaled_sub(a: torch.Tensor, b: torch.Tensor | float, alpha: float) -> torch.Tensor:
    return torch.sub(a, b, alpha=alpha)


def constant_pad(x: torch.Tensor, pad: list[int], value: float) -> torch.Tensor:
    return torch.nn.functional.pad(x, pad, value=value)


# ------------------------------------------------------------------------- copies and fills
@aclnn("aclnnInplaceCopy", "target:T source:T")
def copy(target: DeviceTensor, source: DeviceTensor) -> Run:
    return lambda: target.write(source.read().expand(target.layout.size))


@aclnn("aclnnForeachCopy", "sources:L targets:L")
def foreach_copy(sources: list[DeviceTensor], targets: list[DeviceTensor]) -> Run:
    def run() -> None:
        for source, target in zip(sources, targets, strict=True):
            target.write(source.read())

    return run


@aclnn("aclnnNpuFormatCast", "source:T target:T")
def format_cast(source: DeviceTensor, target: DeviceTensor) -> Run:
    return lambda: target.write(source.read())


@aclnn("aclnnCast", "x:T dtype:y out:T")
def cast(x: DeviceTensor, dtype: torch.dtype, out: DeviceTensor) -> Run:
    return lambda: out.write(x.read())


@aclnn("aclnnArange", "start:S end:S step:S out:T")
def arange(start: float, end: float, step: float, out: DeviceTensor) -> Run:
    return lambda: out.write(torch.arange(start, end, step, dtype=out.layout.dtype))


@aclnn("aclnnCat", "tensors:L dim:i out:T")
def cat(tensors: list[DeviceTensor], dim: int, out: DeviceTensor) -> Run:
    dtype = out.layout.dtype
    return lambda: out.write(torch.cat([t.read().to(dtype) for t in tensors], dim))


@aclnn("aclnnStack", "tensors:L dim:i out:T")
def stack(tensors: list[DeviceTensor], dim: int, out: DeviceTensor) -> Run:
    return lambda: out.write(torch.stack([t.read() for t in tensors], dim))


table("x:T counts:I out:T", {"aclnnRepeat": lambda x, counts: x.repeat(*counts)})
table(
    "x:T count:i dim:i size:i out:T",
    {
        "aclnnRepeatInterleaveIntWithDim": lambda x, count, dim, _: x.repeat_interleave(count, dim),
    },
)
table("x:T pad:I value:S out:T", {"aclnnConstantPadNd": constant_pad})
in_place("x:T", {"aclnnInplaceZero": torch.zeros_like, "aclnnInplaceOne": torch.ones_like})
in_place("x:T value:S", {"aclnnInplaceFillScalar": torch.full_like})
in_place("x:T value:T", {"aclnnInplaceFillTensor": lambda x, value: value.expand_as(x)})

# ------------------------------------------------------------------------------- arithmetic
table("a:T b:T alpha:S out:T", {"aclnnAdd": scaled_add, "aclnnSub": scaled_sub})
table("a:T b:S alpha:S out:T", {"aclnnAdds": scaled_add, "aclnnSubs": scaled_sub})
table("a:T b:S alpha:S out:T", {"aclnnRsubs": lambda a, b, alpha: b - a * alpha})
in_place("a:T b:T alpha:S", {"aclnnInplaceAdd": scaled_add, "aclnnInplaceSub": scaled_sub})
in_place("a:T b:S alpha:S", {"aclnnInplaceAdds": scaled_add, "aclnnInplaceSubs": scaled_sub})
table(
    "a:T b:T out:T",
    {
        "aclnnMul": torch.mul,
        "aclnnDiv": torch.div,
        "aclnnFloorDivide": torch.floor_divide,
        "aclnnMaximum": torch.maximum,
        "aclnnMinimum": torch.minimum,
        "aclnnGtTensor": torch.gt,
        "aclnnGeTensor": torch.ge,
        "aclnnLtTensor": torch.lt,
        "aclnnLeTensor": torch.le,
        "aclnnEqTensor": torch.eq,
        "aclnnNeTensor": torch.ne,
        "aclnnLogicalAnd": torch.logical_and,
        "aclnnLogicalOr": torch.logical_or,
        "aclnnBitwiseAndTensor": torch.bitwise_and,
        "aclnnBitwiseOrTensor": torch.bitwise_or,
        "aclnnRemainderTensorTensor": torch.remainder,
    },
)
table(
    "a:T b:S out:T",
    {
        "aclnnMuls": torch.mul,
        "aclnnDivs": torch.div,
        "aclnnFloorDivides": torch.floor_divide,
        "aclnnGtScalar": torch.gt,
        "aclnnGeScalar": torch.ge,
        "aclnnLtScalar": torch.lt,
        "aclnnLeScalar": torch.le,
        "aclnnEqScalar": torch.eq,
        "aclnnNeScalar": torch.ne,
        "aclnnPowTensorScalar": torch.pow,
        "aclnnRemainderTensorScalar": torch.remainder,
        "aclnnClampMin": torch.clamp_min,
        "aclnnBitwiseAndScalar": torch.bitwise_and,
    },
)
table("a:S b:T out:T", {"aclnnPowScalarTensor": torch.pow})
in_place("a:T b:T", {"aclnnInplaceMul": torch.mul, "aclnnInplaceDiv": torch.div})
in_place("a:T b:S", {"aclnnInplaceMuls": torch.mul, "aclnnInplaceDivs": torch.div})
table("x:T low:S high:S out:T", {"aclnnClamp": torch.clamp})
table(
    "x:T out:T",
    {
        "aclnnNeg": torch.neg,
        "aclnnExp": torch.exp,
        "aclnnCos": torch.cos,
        "aclnnSin": torch.sin,
        "aclnnLog": torch.log,
        "aclnnSqrt": torch.sqrt,
        "aclnnRsqrt": torch.rsqrt,
        "aclnnAbs": torch.abs,
        "aclnnReciprocal": torch.reciprocal,
        "aclnnSigmoid": torch.sigmoid,
        "aclnnSilu": torch.nn.functional.silu,
        "aclnnRound": torch.round,
        "aclnnLogicalNot": torch.logical_not,
        "aclnnBitwiseNot": torch.bitwise_not,
        "aclnnIsFinite": torch.isfinite,
        "aclnnFloor": torch.floor,
        "aclnnCeil": torch.ceil,
        "aclnnTanh": torch.tanh,
    },
)
in_place(
    "x:T",
    {
        "aclnnInplaceExp": torch.exp,
        "aclnnInplaceLog": torch.log,
        "aclnnInplaceNeg": torch.neg,
    },
)


# --------------------------------------------------------------------------------- indexing
def scatter(
    x: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor, reduce: int
) -> torch.Tensor:
    require(reduce == 0, "scatter", "only replacing is simulated, neither sums nor products")
    return torch.scatter(x, dim, index.long(), source)


table("condition:T a:T b:T out:T", {"aclnnSWhere": torch.where})
in_place("x:T mask:T value:S", {"aclnnInplaceMaskedFillScalar": torch.masked_fill})
in_place("x:T dim:i index:T source:T", {"aclnnInplaceIndexCopy": torch.index_copy})
in_place("x:T mask:T value:T", {"aclnnInplaceMaskedFillTensor": torch.masked_fill})
in_place("x:T dim:i index:T source:T reduce:i", {"aclnnInplaceScatter": scatter})
table(
    "x:T dim:i index:T out:T",
    {
        "aclnnIndexSelect": torch.index_select,
        "aclnnGather": lambda x, dim, index: torch.gather(x, dim, index.long()),
    },
)
table(
    "x:T dim:i index:T source:T out:T",
    {"aclnnScatterAdd": lambda x, dim, index, y: torch.scatter_add(x, dim, index.long(), y)},
)
table("x:T diagonal:i out:T", {"aclnnTriu": torch.triu, "aclnnTril": torch.tril})


@aclnn("aclnnEmbedding", "weight:T index:T out:T")
def embedding(weight: DeviceTensor, index: DeviceTensor, out: DeviceTensor) -> Run:
    require(not weight.layout.nz, "embedding", "the table must be in format ND, not NZ")

    def run() -> None:
        rows = index.read().long()
        count = weight.layout.size[0]
        inside = not rows.numel() or (int(rows.min()) >= 0 and int(rows.max()) < count)
        require(inside, "embedding", f"an index lies outside the {count} rows")
        out.write(torch.nn.functional.embedding(rows, weight.read()))

    return run
