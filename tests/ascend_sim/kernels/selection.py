"""The greatest values of a tensor, and elements chosen by index.

Demands: the pages of aclnnTopk, aclnnIndex and aclnnIndexPutImpl (ops-math and ops-nn, 9.0.0).
They leave open which of equal values topk takes, and in which order. Here it takes the last ones,
the last first, where a CPU mostly takes the first: who depends on either gets other tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from ..doors.aclnn import aclnn
from ..limits import Refused, require, require_dtype, require_nd, require_shape
from ..tensors import DeviceTensor, Layout
from .reductions import two_outputs

Run = Callable[[], None]

ORDERED = (
    torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.float32, torch.float64, torch.bfloat16,
)  # fmt: skip
INDEXED = (*ORDERED, torch.bool)
INDICES = (torch.int32, torch.int64, torch.bool)


@cache
def check_topk(x: Layout, k: int, dim: int, ordered: bool, values: Layout, indices: Layout) -> None:
    operator = "topk"
    require_dtype(operator, "self", x, ORDERED)
    require_nd(operator, self=x, values=values, indices=indices)
    require(values.dtype is x.dtype, operator, "values must have the dtype of self")
    require_dtype(operator, "indices", indices, (torch.int64,))
    require(1 <= x.dims <= 8, operator, "self must have 1 to 8 dims")
    require(-x.dims <= dim < x.dims, operator, f"dim {dim} lies outside of {x.dims} dims")
    dim %= x.dims
    require(0 <= k <= x.size[dim], operator, f"k {k} is not in [0, {x.size[dim]}]")
    require(ordered, operator, "sorted can only be True")
    shape = (*x.size[:dim], k, *x.size[dim + 1 :])
    require_shape(operator, "values", values, shape)
    require_shape(operator, "indices", indices, shape)


@aclnn("aclnnTopkV2", "x:T k:i dim:i largest:b ordered:b stable:b values:T indices:T")
def topk(
    x: DeviceTensor,
    k: int,
    dim: int,
    largest: bool,
    ordered: bool,
    stable: bool,
    values: DeviceTensor,
    indices: DeviceTensor,
) -> Run:
    check_topk(x.layout, k, dim, ordered, values.layout, indices.layout)

    def greatest() -> tuple[torch.Tensor, torch.Tensor]:
        backwards = x.read().flip(dim)
        found, places = backwards.sort(dim=dim, descending=largest, stable=True)
        last = x.layout.size[dim] - 1
        return found.narrow(dim, 0, k), last - places.narrow(dim, 0, k)

    return two_outputs(greatest, values, indices)


@aclnn("aclnnTopk", "x:T k:i dim:i largest:b ordered:b values:T indices:T")
def topk_of_older_wheels(
    x: DeviceTensor,
    k: int,
    dim: int,
    largest: bool,
    ordered: bool,
    values: DeviceTensor,
    indices: DeviceTensor,
) -> Run:
    return topk(x, k, dim, largest, ordered, False, values, indices)


def check_indices(operator: str, x: Layout, indices: list[DeviceTensor | None]) -> None:
    given = [each.layout for each in indices if each is not None and each.layout.elements]
    require(bool(given), operator, "there must be an index")
    require(len(indices) <= x.dims, operator, "there must not be more indices than self has dims")
    require_dtype(operator, "self", x, INDEXED)
    require_nd(operator, self=x)
    for layout in given:
        require_dtype(operator, "an index", layout, INDICES)


@aclnn("aclnnIndex", "x:T indices:L out:T")
def index(x: DeviceTensor, indices: list[DeviceTensor | None], out: DeviceTensor) -> Run:
    check_indices("index", x.layout, indices)
    require(out.layout.dtype is x.layout.dtype, "index", "out must have the dtype of self")

    def run() -> None:
        places = index_tensors("index", x.layout, indices)
        out.write(torch.ops.aten.index(x.read(), places))

    return run


@aclnn("aclnnIndexPutImpl", "x:T indices:L values:T accumulate:b unsafe:b")
def index_put(
    x: DeviceTensor,
    indices: list[DeviceTensor | None],
    values: DeviceTensor,
    accumulate: bool,
    unsafe: bool,
) -> Run:
    """Without `accumulate` the last of equal places is not defined to win: they are refused."""
    check_indices("index_put", x.layout, indices)
    same = values.layout.dtype is x.layout.dtype
    require(same, "index_put", "values must have the dtype of self")

    def run() -> None:
        places = index_tensors("index_put", x.layout, indices)
        if not accumulate:
            refuse_duplicates(places)
        torch.ops.aten.index_put_(x.view(), places, values.read(), accumulate)

    return run


def index_tensors(
    operator: str, x: Layout, indices: list[DeviceTensor | None]
) -> list[torch.Tensor | None]:
    """An index that was left out arrives as an empty tensor."""
    places = [i.read() if i is not None and i.layout.elements else None for i in indices]
    for size, index in zip(x.size, places, strict=False):
        if index is not None and index.dtype is not torch.bool:
            inside = bool(((index >= -size) & (index < size)).all())
            require(inside, operator, f"an index lies outside of {size}")
    return places


def refuse_duplicates(places: list[torch.Tensor | None]) -> None:
    given = [place for place in places if place is not None]
    if any(place.dtype is torch.bool for place in given):
        return
    rows = torch.stack([place.long().flatten() for place in torch.broadcast_tensors(*given)], 1)
    if len(rows.unique(dim=0)) < len(rows):
        raise Refused("index_put: a place occurs twice, which of its values wins is not defined")
