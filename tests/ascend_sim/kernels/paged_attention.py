"""_npu_paged_attention (ATB): one query token per sequence over a paged cache.

The context lengths are a CPU int32 tensor, read when the operator is called, so a captured graph
keeps those of the capture until it is updated.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from ..doors.atb import atb
from ..limits import (
    require,
    require_a2_or_a3,
    require_contiguous,
    require_dtype,
    require_nd,
    require_shape,
)
from ..tensors import DeviceTensor, Layout
from .softmax_attention import attend, gather_pages, gather_values
from .workspaces import attention_bytes, scribble

OPERATOR = "_npu_paged_attention"


@cache
def check_layouts(
    query: Layout,
    key_cache: Layout,
    value_cache: Layout,
    kv_heads: int,
    heads: int,
    table: Layout,
    out: Layout,
) -> None:
    require_a2_or_a3(OPERATOR)
    require_dtype(OPERATOR, "query", query, (torch.float16, torch.bfloat16))
    require(query.dims == 3, OPERATOR, "query must be [tokens, heads, head_size]")
    tokens, query_heads, width = query.size
    require(query_heads == heads, OPERATOR, f"num_heads {heads} differs from query {query.size}")
    require(kv_heads > 0 and heads % kv_heads == 0, OPERATOR, "num_heads % num_kv_heads must be 0")
    require(0 < width <= 256, OPERATOR, f"the head size must be 1 to 256, not {width}")
    for name, layout in (("key_cache", key_cache), ("value_cache", value_cache)):
        require(layout.dtype is query.dtype, OPERATOR, f"{name} must have the dtype of query")
        fits = layout.dims == 4 and layout.size[2:] == (kv_heads, width)
        rule = f"{name} {layout.size} must be [blocks, block_size, {kv_heads}, {width}]"
        require(fits, OPERATOR, rule)
        require(layout.size[1] % 16 == 0, OPERATOR, "block_size must be a multiple of 16")
    require_nd(OPERATOR, query=query, key_cache=key_cache, value_cache=value_cache)
    require_dtype(OPERATOR, "block_table", table, (torch.int32,))
    rows = table.dims == 2 and table.size[0] == tokens
    require(rows, OPERATOR, f"block_table {table.size} must have one row per token ({tokens})")
    require_shape(OPERATOR, "out", out, query.size)
    require(out.dtype is query.dtype, OPERATOR, "out must have the dtype of query")
    require_contiguous(OPERATOR, out=out)


def check_lengths(lengths: object, tokens: int, capacity: int) -> list[int]:
    on_host = isinstance(lengths, torch.Tensor)
    require(on_host, OPERATOR, "context_lens must be a CPU tensor: ATB reads it on the host")
    require(lengths.dtype is torch.int32, OPERATOR, "context_lens must be int32")
    rule = f"context_lens must have shape ({tokens},), not {tuple(lengths.shape)}"
    require(lengths.shape == (tokens,), OPERATOR, rule)
    values = lengths.tolist()
    fits = all(0 <= n <= capacity for n in values)
    require(fits, OPERATOR, f"context_lens {values} exceed the block table's {capacity} places")
    return values


@atb("_npu_paged_attention")
def paged_attention(
    query: DeviceTensor,
    key_cache: DeviceTensor,
    value_cache: DeviceTensor,
    kv_heads: int,
    heads: int,
    scale: float,
    table: DeviceTensor,
    context_lens: torch.Tensor,
    out: DeviceTensor,
    workspace: DeviceTensor | None = None,
) -> Callable[[], None]:
    on_device = isinstance(table, DeviceTensor)
    require(on_device, OPERATOR, "block_table must be on the device")
    check_layouts(
        query.layout,
        key_cache.layout,
        value_cache.layout,
        kv_heads,
        heads,
        table.layout,
        out.layout,
    )
    block_size = key_cache.layout.size[1]
    capacity = table.layout.size[1] * block_size
    lengths = check_lengths(context_lens, query.layout.size[0], capacity)
    needed = bytes_for(query, kv_heads, table, key_cache, lengths)
    if workspace is not None:
        enough = workspace.layout.elements * workspace.layout.dtype.itemsize >= needed
        require(enough, OPERATOR, "the workspace is smaller than get_workspace asked for")

    def run() -> None:
        if workspace is not None:
            scribble(workspace, needed)
        compute()
        if workspace is not None:
            scribble(workspace, needed)

    def compute() -> None:
        pages, keys, values = table.read(), key_cache.view(), value_cache.view()
        queries, results = query.read().float(), out.view()
        for row, length in enumerate(lengths):
            if length == 0:
                continue  # a padding row: its output is not written
            k = gather_pages(OPERATOR, keys, pages[row], length)
            v = gather_values(OPERATOR, values, pages[row], length)
            results[row] = attend(queries[row : row + 1], k, v, scale, None)[0]

    return run


@atb("_npu_paged_attention_get_workspace")
def workspace_of(
    query: DeviceTensor,
    key_cache: DeviceTensor,
    _value_cache: DeviceTensor,
    kv_heads: int,
    _heads: int,
    _scale: float,
    table: DeviceTensor,
    context_lens: torch.Tensor,
    *_arguments: object,
) -> torch.Tensor:
    needed = bytes_for(query, kv_heads, table, key_cache, context_lens.tolist())
    return torch.empty(needed, dtype=torch.uint8, device="npu")


def bytes_for(
    query: DeviceTensor,
    kv_heads: int,
    table: DeviceTensor,
    key_cache: DeviceTensor,
    lengths: list[int],
) -> int:
    """Of the workspace of one call, for these lengths."""
    capacity = table.layout.size[1] * key_cache.layout.size[1]
    return attention_bytes(
        len(lengths), kv_heads, query.layout.elements, lengths, capacity, largest=False
    )
