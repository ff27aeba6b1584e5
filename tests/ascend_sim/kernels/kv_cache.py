"""Writing keys and values into a paged cache: npu_scatter_pa_kv_cache, _npu_reshape_and_cache.

Two layouts.  ND: [blocks, block_size, heads, head_size].  PA_NZ: [blocks, heads * head_size / C0,
block_size, C0] with C0 = 32 bytes, where the element d of a head h of a token lies in strip
(h * head_size + d) // C0.  A PA_NZ cache is an ordinary tensor of that shape.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from .. import raw
from ..doors.aclnn import aclnn
from ..doors.atb import atb
from ..limits import (
    Refused,
    require,
    require_a2_or_a3,
    require_contiguous,
    require_dtype,
    require_nd,
    require_shape,
)
from ..nz import STRIP_BYTES
from ..tensors import DeviceTensor, Layout, row_major

SLOT_TYPES = (torch.int32, torch.int64)
HALF = (torch.float16, torch.bfloat16)


def store_nd(cache_tensor: DeviceTensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
    flat = cache_tensor.view().view(-1, *cache_tensor.layout.size[2:])
    flat[slots] = rows


def store_nz(cache_tensor: DeviceTensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
    """rows [T, heads, head_size] into strips; `slots` counts token places over all blocks."""
    size = cache_tensor.layout.size
    blocks = raw.view(cache_tensor.pointer, cache_tensor.layout.dtype, size, row_major(size))
    _, strips, block_size, width = size
    by_strip = rows.reshape(len(rows), strips, width).to(blocks.dtype)
    blocks[slots // block_size, :, slots % block_size] = by_strip


def check_slots(operator: str, slots: torch.Tensor, places: int, lowest: int = 0) -> None:
    if slots.numel() and not (int(slots.min()) >= lowest and int(slots.max()) < places):
        raise Refused(
            f"{operator}: slots must lie in [{lowest}, {places - 1}], got {slots.tolist()}"
        )
    if slots.unique().numel() != slots.numel():
        raise Refused(
            f"{operator}: two rows have one slot, and which of them stays is open: {slots.tolist()}"
        )


# --------------------------------------------------------------------- npu_scatter_pa_kv_cache
@cache
def check_scatter(rows: Layout, cache_layout: Layout, slots: Layout, mode: str | None) -> None:
    operator = "npu_scatter_pa_kv_cache"
    require_a2_or_a3(operator)
    require_dtype(operator, "key and value", rows, (*HALF, torch.int8))
    require(cache_layout.dtype is rows.dtype, operator, "rows and caches must have one dtype")
    require(
        rows.dims == 3, operator, "only rows of 3 dims [tokens, heads, head_size] are simulated"
    )
    require(cache_layout.dims == 4, operator, "a cache must have 4 dims")
    require_dtype(operator, "slot_mapping", slots, SLOT_TYPES)
    require_shape(operator, "slot_mapping", slots, rows.size[:1])
    require_contiguous(operator, rows=rows, cache=cache_layout, slot_mapping=slots)
    _, heads, head_size = rows.size
    blocks, second, third, last = cache_layout.size
    if mode in (None, "Norm"):
        require_nd(operator, cache=cache_layout)
        rule = f"cache_mode Norm needs a cache [blocks, block_size, {heads}, {head_size}]"
        require((third, last) == (heads, head_size), operator, f"{rule}, not {cache_layout.size}")
        return
    require(mode == "PA_NZ", operator, f"cache_mode {mode} is not Norm or PA_NZ")
    width = STRIP_BYTES // rows.dtype.itemsize
    require(head_size % width == 0, operator, "the head size must be a multiple of 32 bytes")
    wanted = f"[blocks, {heads * head_size // width}, block_size, {width}]"
    fits = (second, last) == (heads * head_size // width, width)
    rule = f"cache_mode PA_NZ (the default) needs a cache {wanted}, not {cache_layout.size}"
    require(fits, operator, rule)


@aclnn(
    "aclnnScatterPaKvCache",
    "key:T key_cache:T slots:T value:T value_cache:T compress_lens:T compress_offsets:T "
    "seq_lens:T mode:s scatter_mode:s strides:I offsets:I",
)
def scatter_pa_kv_cache(
    key: DeviceTensor,
    key_cache: DeviceTensor,
    slots: DeviceTensor,
    value: DeviceTensor,
    value_cache: DeviceTensor,
    compress_lens: DeviceTensor | None,
    compress_offsets: DeviceTensor | None,
    seq_lens: DeviceTensor | None,
    mode: str | None,
    scatter_mode: str,
    strides: list[int],
    offsets: list[int],
) -> Callable[[], None]:
    operator = "npu_scatter_pa_kv_cache"
    compressed = not (compress_lens is None and compress_offsets is None and seq_lens is None)
    require(not compressed, operator, "compression is not simulated")
    check_scatter(key.layout, key_cache.layout, slots.layout, mode)
    check_scatter(value.layout, value_cache.layout, slots.layout, mode)
    agree = key.layout.size[:2] == value.layout.size[:2]
    require(agree, operator, "key and value must agree in tokens and heads")
    nd = mode in (None, "Norm")
    blocks, second, third, _ = key_cache.layout.size
    places = blocks * (second if nd else third)
    store = store_nd if nd else store_nz

    def run() -> None:
        positions = slots.read().long()
        check_slots(operator, positions, places)
        store(key_cache, positions, key.read())
        store(value_cache, positions, value.read())

    return run


# ----------------------------------------------------------------------- _npu_reshape_and_cache
@cache
def check_reshape_and_cache(rows: Layout, cache_layout: Layout, slots: Layout) -> None:
    operator = "_npu_reshape_and_cache"
    require_a2_or_a3(operator)
    require_dtype(operator, "key and value", rows, (*HALF, torch.int8))
    require(cache_layout.dtype is rows.dtype, operator, "rows and caches must have one dtype")
    require(rows.dims == 3, operator, "rows must have 3 dims [tokens, heads, head_size]")
    require_dtype(operator, "slot_indices", slots, (torch.int32,))
    require_shape(operator, "slot_indices", slots, rows.size[:1])
    require_contiguous(operator, cache=cache_layout)
    require_nd(operator, cache=cache_layout)
    fits = cache_layout.dims == 4 and cache_layout.size[2:] == rows.size[1:]
    rule = f"the cache {cache_layout.size} must be [blocks, block_size, heads, head_size]"
    require(fits, operator, rule)


@atb("_npu_reshape_and_cache")
def reshape_and_cache(
    key: DeviceTensor,
    value: DeviceTensor,
    key_cache: DeviceTensor,
    value_cache: DeviceTensor,
    slots: DeviceTensor,
) -> Callable[[], None]:
    check_reshape_and_cache(key.layout, key_cache.layout, slots.layout)
    check_reshape_and_cache(value.layout, value_cache.layout, slots.layout)
    places = key_cache.layout.size[0] * key_cache.layout.size[1]

    def run() -> None:
        positions = slots.read().long()
        used = positions >= 0  # ATB leaves out rows with a negative slot
        check_slots("_npu_reshape_and_cache", positions[used], places)
        store_nd(key_cache, positions[used], key.read()[used])
        store_nd(value_cache, positions[used], value.read()[used])

    return run
