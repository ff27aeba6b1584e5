"""q|k|v of a layer, divided into queries, keys and values that kernels read without copying them.

A norm that is given a strided view copies it first, by a launch of its own that no profile of the
host shows, and the cache write takes no strided view at all. Whatever divides the rows of a product
[T, N] therefore moves its bytes once; what differs is the number of launches:

    views                  none, but three copies follow, two of them hidden
    one gather of heads    one
    three products         two more products, which read the codes of the activation three times;
                           and a bf16 weight in FRACTAL_NZ of [N, K] has no contiguous parts
    split_with_sizes_copy  three: torch_npu uses its one kernel for that for more than 32 parts only
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen3_ascend.runtime.backends.npu.attention import HeadCounts

FEW_ROWS = 256
"""Steps of so many tokens at most are bound by launches, and what saves one is kept on the device
for them. Longer ones are bound by arithmetic, and come in any length."""


class HeadDivider:
    """Divides q|k|v, for one model."""

    def __init__(self, counts: HeadCounts) -> None:
        self._counts = counts
        self._orders: dict[int, Tensor] = {}

    def __call__(self, qkv: Tensor) -> list[Tensor]:
        """Queries, keys and values [T, heads, head_dim] of [T, N]; each is contiguous.

        One token is divided by views, up to FEW_ROWS by one launch, more by three.
        """
        counts, rows = self._counts, qkv.shape[0]
        sizes = [counts.heads, counts.kv_heads, counts.kv_heads]
        if not 1 < rows <= FEW_ROWS:
            heads = qkv.view(rows, -1, counts.head_dim)
            return [part.contiguous() for part in torch.split(heads, sizes, dim=1)]
        flat = torch.index_select(qkv.view(-1, counts.head_dim), 0, self._order(rows))
        parts = torch.split(flat, [rows * size for size in sizes])
        return [part.view(rows, -1, counts.head_dim) for part in parts]

    def _order(self, rows: int) -> Tensor:
        """int32 [T * heads]: for all queries, then all keys, then all values of T tokens, the row
        of [T * heads, head_dim] that holds it. Kept, because captured steps read it."""
        if rows not in self._orders:
            heads, kv_heads = self._counts.heads, self._counts.kv_heads
            table = torch.arange(rows * (heads + 2 * kv_heads), dtype=torch.int32).view(rows, -1)
            parts = torch.split(table, [heads, kv_heads, kv_heads], dim=1)
            self._orders[rows] = torch.cat([part.flatten() for part in parts]).to("npu")
        return self._orders[rows]
