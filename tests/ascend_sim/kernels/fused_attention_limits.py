"""What npu_fused_infer_attention_score refuses, by the constraint section of its documentation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace

import torch

from .. import raw, runtime
from ..limits import require, require_a2_or_a3, require_contiguous, require_dtype, require_nd
from ..tensors import DeviceTensor, Layout

OPERATOR = "npu_fused_infer_attention_score"
LAYOUTS = ("BSH", "BSND", "BNSD", "TND")
COMPRESSED_MASK = 2048
MOST_ELEMENTS = 2**31 - 1
MASK_TYPES = (torch.bool, torch.int8, torch.uint8)
NOT_SIMULATED = (
    "pse_shift",
    "dequant_scale1",
    "quant_scale1",
    "dequant_scale2",
    "quant_scale2",
    "quant_offset2",
    "antiquant_scale",
    "antiquant_offset",
    "query_padding",
    "kv_padding",
    "key_antiquant_scale",
    "key_antiquant_offset",
    "value_antiquant_scale",
    "value_antiquant_offset",
    "key_prefix",
    "value_prefix",
    "prefix_length",
    "query_rope",
    "key_rope",
)


@dataclass(frozen=True)
class Shape:
    batch: int  # for TND: 0, the length list tells
    query_length: int  # rows per sequence; for TND all rows
    kv_length: int  # places per sequence
    head_size: int


def check_plain(call: SimpleNamespace) -> None:
    require_a2_or_a3(OPERATOR)
    given = [name for name in NOT_SIMULATED if getattr(call, name) is not None]
    require(not given, OPERATOR, f"{', '.join(given)} is not simulated")
    single = len(call.keys) == 1 and len(call.values) == 1
    require(single, OPERATOR, "tensor lists of keys are not simulated")
    require(call.layout in LAYOUTS, OPERATOR, f"layout {call.layout} is not simulated")
    require(call.sparse_mode in (0, 1, 2, 3), OPERATOR, f"sparse_mode {call.sparse_mode}")


@cache
def check_shapes(
    query: Layout,
    key: Layout,
    value: Layout,
    table: Layout | None,
    mask: Layout | None,
    layout: str,
    heads: int,
    kv_heads: int,
    sparse_mode: int,
    block_size: int,
) -> Shape:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        require_dtype(OPERATOR, name, tensor, (torch.float16, torch.bfloat16))
        require(tensor.dtype is query.dtype, OPERATOR, "query, key and value share one dtype")
    require_nd(OPERATOR, query=query, key=key, value=value)
    require_contiguous(OPERATOR, query=query, key=key, value=value, block_table=table, mask=mask)
    require(heads <= 256 and kv_heads <= 256, OPERATOR, "at most 256 heads")
    divides = heads % kv_heads == 0 and heads // kv_heads <= 64
    require(divides, OPERATOR, "num_heads / num_key_value_heads must be whole and at most 64")
    batch, length, head_size = _query_shape(query, layout, heads)
    _check_head_size(layout, head_size, key, value, kv_heads, table is not None)
    if table is not None:
        _check_pages(query, key, value, table, layout, kv_heads, batch, length, block_size)
        kv_length = table.size[1] * block_size
    else:
        kv_length = key.size[2] if layout == "BNSD" else key.size[1]
    if layout != "TND" and length == 1:
        _check_mask_of_one_token(mask, sparse_mode, batch, kv_length)
    else:
        _check_mask(mask, sparse_mode, layout, table is not None, kv_length)
    return Shape(batch, length, kv_length, head_size)


def _query_shape(query: Layout, layout: str, heads: int) -> tuple[int, int, int]:
    dims = 3 if layout in ("BSH", "TND") else 4
    require(query.dims == dims, OPERATOR, f"query {query.size} must have {dims} dims ({layout})")
    if layout == "BSH":
        whole = query.size[2] % heads == 0
        require(whole, OPERATOR, "the hidden size must be a multiple of num_heads")
        return query.size[0], query.size[1], query.size[2] // heads
    axis = {"BSND": 2, "BNSD": 1, "TND": 1}[layout]
    require(query.size[axis] == heads, OPERATOR, f"query {query.size} does not have {heads} heads")
    if layout == "TND":
        return 0, query.size[0], query.size[2]
    length = query.size[2] if layout == "BNSD" else query.size[1]
    return query.size[0], length, query.size[3]


def _check_head_size(
    layout: str, size: int, key: Layout, value: Layout, kv_heads: int, paged: bool
) -> None:
    whole_row = key.dims == 3 and (paged or layout == "BSH")
    key_size, value_size = (
        (t.size[-1] // kv_heads if whole_row else t.size[-1]) for t in (key, value)
    )
    require(key_size == size, OPERATOR, f"key heads of {key_size} for query heads of {size}")
    if layout == "TND":
        allowed = ((128, 128), (192, 128), (192, 192))
        fits = (size, value_size) in allowed
        rule = f"TND needs a head size of 128 (or 192 with values of 128), not {size}"
        require(fits, OPERATOR, rule)
        return
    require(value_size == size, OPERATOR, "key and value must have one head size")
    require(
        size <= 512 and size % 8 == 0,
        OPERATOR,
        f"the head size must be 16-byte aligned and at most 512, not {size}",
    )


def _check_pages(
    query: Layout,
    key: Layout,
    value: Layout,
    table: Layout,
    layout: str,
    kv_heads: int,
    batch: int,
    length: int,
    block_size: int,
) -> None:
    require_dtype(OPERATOR, "block_table", table, (torch.int32,))
    require(table.dims == 2, OPERATOR, "block_table must be two-dimensional")
    require(key.size[:-1] == value.size[:-1], OPERATOR, "key and value caches differ in shape")
    by_row = key.dims == 3
    allowed = by_row or (key.dims == 4 and layout in ("BNSD", "TND"))
    rule = f"a paged cache {key.size} must be [blocks, block_size, heads * D]"
    require(allowed, OPERATOR, rule + " or, for BNSD and TND, [blocks, heads, block_size, D]")
    held = key.size[1] if by_row else key.size[2]
    require(held == block_size, OPERATOR, f"block_size {block_size} but the cache has {key.size}")
    rule = f"cache {key.size} for {kv_heads} kv heads"
    require(by_row or key.size[1] == kv_heads, OPERATOR, rule)
    wide = by_row and key.size[2] > 65535
    require(not wide, OPERATOR, "heads * D above 65535 needs [blocks, heads, block_size, D]")
    if layout == "TND":
        fits = block_size % 16 == 0 and 0 < block_size <= 1024
        rule = f"TND: block_size must be a multiple of 16, at most 1024, not {block_size}"
        require(fits, OPERATOR, rule)
        return
    rows = table.size[0] == batch
    require(rows, OPERATOR, f"561002: block_table has {table.size[0]} rows for batch {batch}")
    if length > 1:
        fits = block_size % 128 == 0 and 128 <= block_size <= 512
        rule = f"prefill: block_size must be 128, 256, 384 or 512, not {block_size}"
    else:
        fits = block_size % 16 == 0 and 0 < block_size <= 512
        rule = f"decode: block_size must be a multiple of 16, at most 512, not {block_size}"
        counted = key.elements <= MOST_ELEMENTS
        require(counted, OPERATOR, f"decode: a cache {key.size} of more elements than int32 counts")
    require(fits, OPERATOR, rule)


def _check_mask(
    mask: Layout | None, sparse_mode: int, layout: str, paged: bool, kv_length: int
) -> None:
    if sparse_mode in (2, 3):
        require(mask is not None, OPERATOR, f"sparse_mode {sparse_mode} needs the 2048 x 2048 mask")
    if mask is None:
        require(sparse_mode != 1, OPERATOR, "sparse_mode 1 needs a mask")
        return
    require_dtype(OPERATOR, "atten_mask", mask, MASK_TYPES)
    if sparse_mode in (2, 3):
        _check_compressed_shape(mask)
        return
    require(layout != "TND", OPERATOR, "a full mask with TND is not simulated")
    if paged:
        rule = f"the mask's last dim must cover the block table's {kv_length} places"
        require(mask.size[-1] >= kv_length, OPERATOR, rule)


def _check_mask_of_one_token(
    mask: Layout | None, sparse_mode: int, batch: int, kv_length: int
) -> None:
    """With one query token for each sequence, sparse_mode is without effect (op-plugin's page of
    the operator), and the mask is [B, KV_S], [B, 1, KV_S] or [B, 1, 1, KV_S]: the tiling compares
    its first dim with the batch and its last with all places of the block table
    (incre_flash_attention_tiling.cpp, ProcessAttenMask)."""
    if mask is None:
        return
    require_dtype(OPERATOR, "atten_mask", mask, MASK_TYPES)
    if sparse_mode in (2, 3):
        _check_compressed_shape(mask)
        return
    rule = f"batchSize[{mask.size[0]}] of atten_mask must be equal to batchSize[{batch}] of query"
    require(mask.size[0] == batch, OPERATOR, rule)
    ones = 2 <= mask.dims <= 4 and all(n == 1 for n in mask.size[1:-1])
    rule = f"atten_mask {mask.size} must be (B, KV_S), (B, 1, KV_S) or (B, 1, 1, KV_S)"
    require(ones, OPERATOR, rule)
    rule = f"s Size[{mask.size[-1]}] of atten_mask must be greater than or equal to sMax"
    require(mask.size[-1] >= kv_length, OPERATOR, f"{rule}[{kv_length}]")


def _check_compressed_shape(mask: Layout) -> None:
    square = mask.size[-2:] == (COMPRESSED_MASK, COMPRESSED_MASK)
    leading = all(n == 1 for n in mask.size[:-2])
    require(square and leading, OPERATOR, f"the mask must be 2048 x 2048, not {mask.size}")


def check_lengths(call: SimpleNamespace, shape: Shape) -> None:
    """The host lists.  For TND this also sets the batch, which only they tell."""
    paged = call.table is not None
    require(not paged or call.kv_lengths, OPERATOR, "a block table needs actual_seq_lengths_kv")
    if call.layout == "TND":
        _check_tnd_lengths(call, shape)
        _check_blocks(call, call.kv_lengths)
        return
    for name, lengths, most in (
        ("actual_seq_lengths", call.query_lengths, shape.query_length),
        ("actual_seq_lengths_kv", call.kv_lengths, shape.kv_length),
    ):
        if not lengths or (name == "actual_seq_lengths" and shape.query_length == 1):
            continue
        enough = len(lengths) == 1 or len(lengths) >= shape.batch
        rule = f"561002: {name} has {len(lengths)} entries for batch {shape.batch}"
        require(enough, OPERATOR, rule)
        fits = all(0 <= n <= most for n in lengths)
        require(fits, OPERATOR, f"{name} {lengths} must lie in [0, {most}]")
    if paged:
        single = len(call.kv_lengths) == 1
        _check_blocks(call, call.kv_lengths * shape.batch if single else call.kv_lengths)


def _check_blocks(call: SimpleNamespace, kv_lengths: list[int]) -> None:
    """The tiling counts a block once for each row that reads it, shared or not."""
    if call.table is None:
        return
    needed = sum(-(-length // call.block_size) for length in kv_lengths)
    held = call.keys[0].layout.size[0]
    rule = f"the first dim of key({held}) should not less than valid block num({needed})"
    require(needed <= held, OPERATOR, f"{rule} when PA enable")


def _check_tnd_lengths(call: SimpleNamespace, shape: Shape) -> None:
    query, kv = call.query_lengths, call.kv_lengths
    require(query and kv, OPERATOR, "TND needs actual_seq_lengths and actual_seq_lengths_kv")
    batch = len(query)
    require(batch <= 4096, OPERATOR, "TND takes at most 4096 sequences")
    require(len(kv) == batch, OPERATOR, f"561002: {batch} query lengths but {len(kv)} kv lengths")
    rising = all(a <= b for a, b in zip([0, *query], query, strict=False))
    require(rising, OPERATOR, f"actual_seq_lengths must be cumulative, not {query}")
    rows = shape.query_length
    rule = f"the last actual_seq_lengths {query[-1]} must be the number of rows {rows}"
    require(query[-1] == shape.query_length, OPERATOR, rule)
    if call.table is not None:
        rows = call.table.layout.size[0]
        require(rows == batch, OPERATOR, f"561002: block_table has {rows} rows for batch {batch}")
        fits = all(0 <= n <= shape.kv_length for n in kv)
        require(fits, OPERATOR, f"actual_seq_lengths_kv {kv} exceed {shape.kv_length} places")
    else:
        rising = all(a <= b for a, b in zip([0, *kv], kv, strict=False))
        require(rising, OPERATOR, f"without pages, actual_seq_lengths_kv must be cumulative: {kv}")
        held = call.keys[0].layout.size[0]
        require(kv[-1] == held, OPERATOR, f"actual_seq_lengths_kv end at {kv[-1]} of {held} keys")


_checked_masks: set[tuple[int, int]] = set()


def check_compressed_mask(mask: DeviceTensor) -> None:
    """1 above the diagonal, 0 elsewhere.  All of it once per buffer, three places every time."""
    values = raw.view(
        mask.pointer,
        torch.uint8,
        (COMPRESSED_MASK, COMPRESSED_MASK),
        (COMPRESSED_MASK, 1),
        mask.layout.offset,
    )
    spot = bool(values[0, 1]) and not bool(values[0, 0]) and not bool(values[1, 0])
    key = (mask.pointer, runtime.library.sim_free_counter()[0])
    if spot and key in _checked_masks:
        return
    whole = torch.ones_like(values).triu(1)
    right = spot and torch.equal((values != 0).to(torch.uint8), whole)
    require(right, OPERATOR, "the 2048 x 2048 mask must be 1 above the diagonal and 0 elsewhere")
    _checked_masks.add(key)
