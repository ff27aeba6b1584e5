"""Prefetching MLP weights into the L2 cache while attention's output is projected.

npu_prefetch is a hint: it reads weights, which never change, and writes nothing that a kernel can
see. So a missing wait is no data race; it only lets the copy compete with other work for memory
bandwidth. Two things do matter: a side stream that was forked inside a capture and not joined
again makes the capture fail (error 107025), and more bytes than the cache holds push out what was
just fetched.
"""

from __future__ import annotations

from typing import Any

import torch_npu
from torch import Tensor

from qwen3_ascend.files.text import parse_size
from qwen3_ascend.runtime.backends.npu.side_stream import SideStream

DEFAULT_L2_BYTES = 192 << 20
"""L2 of an Ascend 910B, for drivers that do not state it (sgl-kernel-npu, hardware.h)."""

L2_SHARE = 2
"""Half of the L2: measured by others, 80 to 100 MB gain and 120 MB lose on 192 MB (sglang #1509).
"""

MAX_TOKENS = 500
"""Beyond so many tokens a step is bound by arithmetic, not by memory (vllm-ascend's bound)."""


def prefetch_budget(setting: str | int, l2_bytes: int) -> int:
    """Bytes to prefetch for one layer's MLP.

    Args:
        setting: "off", "auto" (half of the L2), or a size such as 50000000 or "64MiB".
        l2_bytes: of the device; 0 if unknown.
    """
    if setting == "off":
        return 0
    if setting == "auto":
        return (l2_bytes or DEFAULT_L2_BYTES) // L2_SHARE
    return parse_size(setting)


class Prefetcher:
    """One side stream, forked from the compute stream and joined to it again."""

    def __init__(self, budget: int) -> None:
        """`budget` bytes for each fork; 0 turns everything into a no-op."""
        self.budget = budget
        self._side = SideStream() if budget else None
        self._forked: Any = None

    def fork(self, weights: tuple[Tensor, ...], after: Tensor) -> None:
        """Fetches the weights in order, as far as the budget goes, once `after` is computed."""
        if self._side is None or after.shape[0] > MAX_TOKENS:
            return
        left, stream = self.budget, self._side.beside_current()
        stream.wait_stream(torch_npu.npu.current_stream())
        with torch_npu.npu.stream(stream):
            for weight in weights:
                size = min(left, weight.untyped_storage().nbytes())
                if size:
                    torch_npu.npu_prefetch(weight, after, size)
                left -= size
        self._forked = stream

    def join(self) -> None:
        """Lets the compute stream wait for the side stream."""
        if self._forked is not None:
            torch_npu.npu.current_stream().wait_stream(self._forked)
            self._forked = None
