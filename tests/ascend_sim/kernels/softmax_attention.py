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

    `masked` is True where a query must not look.  A row that may look nowhere gives zeros."""
    heads, kv_heads = query.shape[1], key.shape[1]
    grouped = query.unflatten(1, (kv_heads, heads // kv_heads)).permute(1, 2, 0, 3)
    keys = key.float().permute(1, 2, 0).unsqueeze(1)
    scores = torch.matmul(grouped, keys) * scale
    if masked is not None:
        scores = scores.masked_fill(masked, float("-inf"))
    weights = torch.softmax(scores, -1)
    if masked is not None:
        weights = torch.nan_to_num(weights)
    values = value.float().permute(1, 0, 2).unsqueeze(1)
    return torch.matmul(weights, values).permute(2, 0, 1, 3).flatten(1, 2)


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
