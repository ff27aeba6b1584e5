"""npu_scatter_nd_update_: rows of a tensor replaced by index."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from ..doors.aclnn import aclnn
from ..limits import Refused, require, require_dtype, require_nd, require_shape
from ..tensors import DeviceTensor, Layout

OPERATOR = "npu_scatter_nd_update_"
TYPES = (torch.float32, torch.float16, torch.bool, torch.bfloat16, torch.int64, torch.int8)


@cache
def check_scatter_nd(target: Layout, indices: Layout, updates: Layout) -> None:
    require_dtype(OPERATOR, "input", target, TYPES)
    require_dtype(OPERATOR, "indices", indices, (torch.int32, torch.int64))
    require(updates.dtype is target.dtype, OPERATOR, "input and updates must have one dtype")
    require_nd(OPERATOR, input=target, indices=indices, updates=updates)
    require(1 <= target.dims <= 8, OPERATOR, "input must have 1 to 8 dims")
    require(indices.dims >= 2, OPERATOR, "indices must have 2 dims or more")
    depth = indices.size[-1]
    require(depth <= target.dims, OPERATOR, "an index must not be longer than input has dims")
    require_shape(OPERATOR, "updates", updates, (*indices.size[:-1], *target.size[depth:]))


@aclnn("aclnnScatterNdUpdate", "target:T indices:T updates:T")
def scatter_nd_update(
    target: DeviceTensor, indices: DeviceTensor, updates: DeviceTensor
) -> Callable[[], None]:
    check_scatter_nd(target.layout, indices.layout, updates.layout)
    depth = indices.layout.size[-1]
    limits = torch.tensor(target.layout.size[:depth])

    def run() -> None:
        places = indices.read().long()
        if not bool(((places >= 0) & (places < limits)).all()):
            raise Refused(f"{OPERATOR}: an index lies outside of {tuple(limits.tolist())}")
        target.view()[tuple(places.unbind(-1))] = updates.read().to(target.layout.dtype)

    return run
