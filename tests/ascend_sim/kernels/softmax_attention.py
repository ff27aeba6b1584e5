"""Softmax attention of one sequence, and the reading of its pages."""

from __future__ import annotations

import torch

from ..limits import Refused


def gather_pages(
    operator: str, cache: torch.Tensor, pages: torch.Tensor, length: int
) -> torch.Tensor:
    """The first `length` rows [length, heads, head_size] of a cache [blocks, block_size, ...]."""
    return _whole_pages(operator, cache, pages, length)[:length]


def gather_values(
    operator: str, cache: torch.Tensor, pages: torch.Tensor, length: int
) -> torch.Tensor:
    """So, of values.  That a kernel stops at `length` and not at the end of the block is nowhere
    documented: it may multiply what follows by probabilities of 0, and 0 * NaN is NaN."""
    rows = _whole_pages(operator, cache, pages, length)
    clean = bool(rows[length:].isfinite().all())
    return rows[:length] if clean else torch.full_like(rows[:length], float("nan"))


def _whole_pages(
    operator: str, cache: torch.Tensor, pages: torch.Tensor, length: int
) -> torch.Tensor:
    used = pages[: -(-length // cache.shape[1])].long()
    if int(used.min()) < 0 or int(used.max()) >= cache.shape[0]:
        raise Refused(f"{operator}: block table {used.tolist()} names blocks outside the cache")
    return cache[used].flatten(0, 1)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    masked: torch.Tensor | None,
) -> torch.Tensor:
    """query [Q, heads, D] (float32), key and value [KV, kv_heads, D] -> [Q, heads, D_value].

    `masked` [Q, KV] is True where a query must not look.  A row that may look nowhere gives zeros.
    Sums are in the order of torch's own operator (README, "The order of float sums")."""
    allowed = None if masked is None else ~masked
    queries, keys, values = (each.float().transpose(0, 1)[None] for each in (query, key, value))
    attended = torch.nn.functional.scaled_dot_product_attention(
        queries, keys, values, attn_mask=allowed, scale=scale, enable_gqa=True
    )[0].transpose(0, 1)
    if masked is None:
        return attended
    return attended.masked_fill(masked.all(-1).view(-1, 1, 1), 0.0)


def log_sum_exp(
    query: torch.Tensor, key: torch.Tensor, scale: float, masked: torch.Tensor | None
) -> torch.Tensor:
    """[Q, heads, 1]"""
    group = query.shape[1] // key.shape[1]
    keys = key.float().repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->qhk", query, keys) * scale
    if masked is not None:
        scores = scores.masked_fill(masked.unsqueeze(1), float("-inf"))
    return torch.logsumexp(scores, -1, keepdim=True)
