"""npu_fused_infer_attention_score (aclnnFusedInferAttentionScoreV3).

The sequence lengths are host lists, part of the call.  For TND, actual_seq_lengths counts up over
the sequences; actual_seq_lengths_kv does so too, except with a block table, where it is per
sequence.  Quantized, rope-split, prefixed and left-padded forms are refused as not simulated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from ..doors.aclnn import aclnn
from ..limits import require
from ..tensors import DeviceTensor
from . import fused_attention_limits as limits
from .fused_attention_limits import OPERATOR
from .softmax_attention import attend, gather_pages, gather_values, log_sum_exp
from .workspaces import attention_bytes

SIGNATURE = (
    "query:T keys:L values:L pse_shift:T mask:T query_lengths:I kv_lengths:I "
    "dequant_scale1:T quant_scale1:T dequant_scale2:T quant_scale2:T quant_offset2:T "
    "antiquant_scale:T antiquant_offset:T table:T query_padding:T kv_padding:T "
    "key_antiquant_scale:T key_antiquant_offset:T value_antiquant_scale:T "
    "value_antiquant_offset:T key_prefix:T value_prefix:T prefix_length:I query_rope:T "
    "key_rope:T key_rope_antiquant_scale:T heads:i scale:d pre_tokens:i next_tokens:i layout:s "
    "kv_heads:i sparse_mode:i inner_precise:i block_size:i antiquant_mode:i lse_flag:b "
    "key_antiquant_mode:i value_antiquant_mode:i out:T lse:T"
)
NAMES = tuple(part.split(":")[0] for part in SIGNATURE.split())


@dataclass(frozen=True)
class Sequence:
    """Which query rows attend to which keys."""

    index: int
    query_rows: slice  # of the flattened [T, heads, D] query
    kv_start: int  # without pages: the first row of the flattened keys
    kv_length: int


def sequences(
    call: SimpleNamespace, batch: int, query_length: int, kv_length: int
) -> list[Sequence]:
    if call.layout == "TND":
        starts = [0, *call.query_lengths]
        kv = call.kv_lengths
        paged = call.table is not None
        kv_starts = [0] * batch if paged else [0, *kv][:batch]
        return [
            Sequence(i, slice(starts[i], starts[i + 1]), kv_starts[i], kv[i] - kv_starts[i])
            for i in range(batch)
        ]
    given = call.kv_lengths or [kv_length]
    lengths = given * batch if len(given) == 1 else given
    used = given_lengths(call.query_lengths, batch, query_length)
    return [
        Sequence(i, slice(i * query_length, i * query_length + used[i]), i * kv_length, lengths[i])
        for i in range(batch)
    ]


def given_lengths(lengths: list[int] | None, batch: int, length: int) -> list[int]:
    """actual_seq_lengths is without effect when every query has one token."""
    if not lengths or length == 1:
        return [length] * batch
    return lengths * batch if len(lengths) == 1 else lengths


def workspace_bytes(*arguments: object, largest: bool = False) -> int:
    """See workspaces.attention_bytes."""
    call = SimpleNamespace(**dict(zip(NAMES, arguments, strict=True)))
    key = call.keys[0].layout
    paged = call.table is not None
    rows = call.table.layout.size[0] if paged else max(1, len(call.kv_lengths or ()))
    capacity = call.table.layout.size[1] * call.block_size if paged else key.elements
    return attention_bytes(
        rows,
        call.kv_heads or call.heads,
        call.query.layout.elements,
        call.kv_lengths or (),
        capacity,
        largest,
    )


@aclnn("aclnnFusedInferAttentionScoreV3", SIGNATURE, workspace=workspace_bytes)
def fused_infer_attention_score(*arguments: object) -> Callable[[], None]:
    call = SimpleNamespace(**dict(zip(NAMES, arguments, strict=True)))
    call.kv_heads = call.kv_heads or call.heads
    limits.check_plain(call)
    key, value = call.keys[0], call.values[0]
    shape = limits.check_shapes(
        call.query.layout,
        key.layout,
        value.layout,
        call.table and call.table.layout,
        call.mask and call.mask.layout,
        call.layout,
        call.heads,
        call.kv_heads,
        call.sparse_mode,
        call.block_size,
    )
    limits.check_lengths(call, shape)
    batch = shape.batch or len(call.query_lengths)
    plan = sequences(call, batch, shape.query_length, shape.kv_length)
    return lambda: compute(call, shape, plan, key, value)


def compute(
    call: SimpleNamespace,
    shape: limits.Shape,
    plan: list[Sequence],
    key: DeviceTensor,
    value: DeviceTensor,
) -> None:
    query = flat_rows(call.query.read(), call.layout, call.heads).float()
    keys, values = (pages_or_rows(call, t.read()) for t in (key, value))
    if call.mask is not None and call.sparse_mode in (2, 3):
        limits.check_compressed_mask(call.mask)
    result = torch.zeros(query.shape[0], call.heads, values.shape[-1])
    lse = torch.zeros(query.shape[0], call.heads, 1)
    for sequence in plan:
        if sequence.kv_length == 0:
            continue
        rows = query[sequence.query_rows]
        k = rows_of(call, keys, sequence, gather_pages)
        v = rows_of(call, values, sequence, gather_values)
        masked = mask_of(call, sequence, rows.shape[0])
        result[sequence.query_rows] = attend(rows, k, v, call.scale, masked)
        if call.lse_flag:
            lse[sequence.query_rows] = log_sum_exp(rows, k, call.scale, masked)
    call.out.write(from_rows(result, call.layout, shape))
    call.lse.write(
        from_rows(lse, "BNSD", shape)
        if call.lse_flag and call.layout != "TND"
        else lse
        if call.lse_flag
        else torch.zeros(1)
    )


def flat_rows(x: torch.Tensor, layout: str, heads: int) -> torch.Tensor:
    """Any layout as [rows, heads, D]."""
    if layout == "BSH":
        return x.unflatten(-1, (heads, -1)).flatten(0, 1)
    if layout == "BNSD":
        return x.transpose(1, 2).flatten(0, 1)
    return x.flatten(0, 1) if layout == "BSND" else x


def from_rows(x: torch.Tensor, layout: str, shape: limits.Shape) -> torch.Tensor:
    if layout == "TND":
        return x
    by_batch = x.unflatten(0, (shape.batch, shape.query_length))
    if layout == "BNSD":
        return by_batch.transpose(1, 2)
    return by_batch.flatten(2) if layout == "BSH" else by_batch


def pages_or_rows(call: SimpleNamespace, x: torch.Tensor) -> torch.Tensor:
    """A paged cache as [blocks, block_size, heads, D]; plain keys as [rows, heads, D]."""
    if call.table is None:
        return flat_rows(x, call.layout, call.kv_heads)
    return x.unflatten(-1, (call.kv_heads, -1)) if x.dim() == 3 else x.transpose(1, 2)


Gather = Callable[[str, torch.Tensor, torch.Tensor, int], torch.Tensor]


def rows_of(
    call: SimpleNamespace, x: torch.Tensor, sequence: Sequence, gather: Gather
) -> torch.Tensor:
    if call.table is None:
        return x[sequence.kv_start : sequence.kv_start + sequence.kv_length]
    return gather(OPERATOR, x, call.table.read()[sequence.index], sequence.kv_length)


def mask_of(call: SimpleNamespace, sequence: Sequence, rows: int) -> torch.Tensor | None:
    """True where a query must not look."""
    one_token = rows == 1 and call.layout != "TND"
    if call.sparse_mode == 3 and not one_token:
        shift = sequence.kv_length - rows  # the last query sees the last key
        return torch.ones(rows, sequence.kv_length, dtype=torch.bool).triu(shift + 1)
    if call.sparse_mode == 2 and not one_token:
        return torch.ones(rows, sequence.kv_length, dtype=torch.bool).triu(1)
    if call.mask is None or call.sparse_mode in (2, 3):
        return None
    mask = call.mask.read().bool()
    if one_token:  # [B, KV_S], [B, 1, KV_S] or [B, 1, 1, KV_S]: always one row for each sequence
        return mask.flatten(0, -2)[sequence.index : sequence.index + 1, : sequence.kv_length]
    mask = mask.reshape(-1, *mask.shape[-2:])
    own = mask[sequence.index if mask.shape[0] > 1 else 0]
    require(own.shape[0] >= rows, OPERATOR, "the mask has fewer rows than the query")
    return own[:rows, : sequence.kv_length]
