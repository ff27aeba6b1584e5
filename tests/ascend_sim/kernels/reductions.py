"""Softmax, sums, extrema, sorting and the random fills: plain torch semantics."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

from .. import raw
from ..doors.aclnn import aclnn
from ..tensors import DIMS_FIELD, MAX_DIMS, VIEW_FIELD, DeviceTensor, from_acl_tensor
from .elementwise import table

Run = Callable[[], None]

table("x:T dim:i out:T", {"aclnnSoftmax": torch.softmax, "aclnnLogSoftmax": torch.log_softmax})
table("x:T dim:i keep:b out:T", {"aclnnArgMax": torch.argmax, "aclnnArgMin": torch.argmin})
table("x:T out:T", {"aclnnMax": torch.amax, "aclnnMin": torch.amin})
table(
    "x:T dims:I keep:b out:T",
    {
        "aclnnAmax": torch.amax,
        "aclnnAmin": torch.amin,
        "aclnnAny": lambda x, dims, keep: torch.any(x, tuple(dims) or None, keep),
        "aclnnAll": lambda x, dims, keep: torch.all(x, tuple(dims) or None, keep),
    },
)
table("x:T dim:i dtype:y out:T", {"aclnnCumsum": lambda x, dim, _dtype: torch.cumsum(x, dim)})


table("a:T b:T out:T", {"aclnnEqual": lambda a, b: torch.tensor([torch.equal(a, b)])})


@aclnn("aclnnReduceSum", "x:T dims:I keep:b dtype:y out:T")
def reduce_sum(
    x: DeviceTensor, dims: list[int], keep: bool, dtype: object, out: DeviceTensor
) -> Run:
    return lambda: out.write(torch.sum(_wide(x), tuple(dims) or None, keep))


@aclnn("aclnnMean", "x:T dims:I keep:b dtype:y out:T")
def mean(x: DeviceTensor, dims: list[int], keep: bool, dtype: object, out: DeviceTensor) -> Run:
    return lambda: out.write(torch.mean(_wide(x), tuple(dims) or None, keep))


def _wide(x: DeviceTensor) -> torch.Tensor:
    values = x.read()
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def two_outputs(
    function: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    values: DeviceTensor,
    indices: DeviceTensor,
) -> Run:
    def run() -> None:
        found, places = function()
        values.write(found)
        indices.write(places)

    return run


@aclnn("aclnnMaxDim", "x:T dim:i keep:b values:T indices:T")
def max_dim(
    x: DeviceTensor, dim: int, keep: bool, values: DeviceTensor, indices: DeviceTensor
) -> Run:
    return two_outputs(lambda: torch.max(x.read(), dim, keep), values, indices)


@aclnn("aclnnSort", "x:T stable:b dim:i descending:b values:T indices:T")
def sort(
    x: DeviceTensor,
    stable: bool,
    dim: int,
    descending: bool,
    values: DeviceTensor,
    indices: DeviceTensor,
) -> Run:
    def ordered() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.sort(x.read(), dim=dim, descending=descending, stable=True)

    return two_outputs(ordered, values, indices)


# Outputs whose size depends on the data.  The wheel allocates the largest, waits for the device and
# asks the runtime for the true shape, which is the second field and the view of its structure.
def _shrink(address: int, size: tuple[int, ...]) -> None:
    fields = (ctypes.c_int64 * (VIEW_FIELD + MAX_DIMS)).from_address(address)
    fields[DIMS_FIELD] = len(size)
    fields[VIEW_FIELD : VIEW_FIELD + len(size)] = list(size)


def _of_any_size(function: Callable[..., torch.Tensor]) -> Callable[..., Run]:
    def plan(*arguments: Any) -> Run:
        *inputs, address = arguments
        out = from_acl_tensor(address)
        assert out is not None

        def run() -> None:
            values = function(*(tensor.read() for tensor in inputs))
            flat = raw.view(out.pointer, out.layout.dtype, (values.numel(),), (1,))
            flat.copy_(values.flatten())
            _shrink(address, tuple(values.shape))

        return run

    return plan


aclnn("aclnnMaskedSelect", "x:T mask:T out:i")(_of_any_size(torch.masked_select))
aclnn("aclnnNonzero", "x:T out:i")(_of_any_size(torch.nonzero))


# The device's generator counts (seed, offset); equal pairs give equal numbers, as on the device,
# but not the device's numbers.
def _generator(seed: int, offset: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + offset) & 0x7FFF_FFFF_FFFF_FFFF)


@aclnn("aclnnInplaceUniform", "x:T low:d high:d seed:i offset:i")
def uniform(x: DeviceTensor, low: float, high: float, seed: int, offset: int) -> Run:
    generator = _generator(seed, offset)
    return lambda: x.write(torch.rand(x.layout.size, generator=generator) * (high - low) + low)


@aclnn("aclnnInplaceNormal", "x:T mean:f deviation:f seed:i offset:i")
def normal(x: DeviceTensor, mean: float, deviation: float, seed: int, offset: int) -> Run:
    generator = _generator(seed, offset)
    return lambda: x.write(torch.randn(x.layout.size, generator=generator) * deviation + mean)


@aclnn("aclnnMultinomial", "x:T count:i replacement:b seed:i offset:i out:T")
def multinomial(
    x: DeviceTensor, count: int, replacement: bool, seed: int, offset: int, out: DeviceTensor
) -> Run:
    generator = _generator(seed, offset)
    return lambda: out.write(
        torch.multinomial(x.read().float(), count, replacement, generator=generator)
    )
