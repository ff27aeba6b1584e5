"""Cosines and sines of the positions that steps have come to, kept for the steps behind them.

A step of decoding needs one row a request. Computed anew it would wake the threads of torch's
library for cosines, which then look for more work for milliseconds, in the way of the kernels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LEAST_ROWS = 1024
"""Positions of the first table: half a MiB of it each, computed in a fraction of a millisecond."""


class GrowingTable:
    """A table that is as long as twice the longest context so far needs, at most."""

    def __init__(self, compute: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        """Computes nothing yet.

        Args:
            compute: cosines and sines, float32 [T, head_dim], of positions [T].
        """
        self._compute = compute
        self._cos, self._sin = torch.empty(0, 0), torch.empty(0, 0)

    def rows(self, positions: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of integer positions [T], all of them before `end`."""
        if end > len(self._cos):
            length = max(LEAST_ROWS, 1 << (end - 1).bit_length())
            self._cos, self._sin = self._compute(torch.arange(length))
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)
