"""How much scratch memory attention asks for: it varies with the rows and with their lengths.

No page tells the sizes. As on a card, a few rows with long contexts are split over the cores,
and each part keeps its output in float32; many rows are not split and need less. A split that
would leave cores idle is not made, so a longer context may need less than a shorter one: nobody
may take the size of one call for that of another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..tensors import DeviceTensor

SYSTEM_BYTES = 1 << 16
"""What every call has. A card reserves 16 MiB, which would be filled with NaN in vain here."""

CORES = 20
KEYS_OF_A_PART = 128
POISON = 0x7FFD
"""NaN in 16 bits, as in memory.c."""


def attention_bytes(
    rows: int,
    kv_heads: int,
    query_elements: int,
    lengths: Sequence[int],
    capacity: int,
    largest: bool,
) -> int:
    """Bytes for one call.

    Args:
        rows: sequences of the call.
        query_elements: of all rows and heads.
        lengths: keys of each row; ignored with `largest`.
        capacity: keys that a row can have at most.
        largest: for the lengths that need most.
    """
    idle = max(1, CORES // max(1, rows * kv_heads))
    longest = max(lengths, default=1)
    if largest:
        parts = max(_parts(length, idle) for length in range(1, capacity + 1, KEYS_OF_A_PART))
    else:
        parts = _parts(longest, idle)
    return SYSTEM_BYTES + (4 * query_elements * parts if parts > 1 else 0)


def _parts(length: int, idle: int) -> int:
    blocks = -(-max(1, length) // KEYS_OF_A_PART)
    return blocks // -(-blocks // idle)


def scribble(workspace: DeviceTensor, needed: int) -> None:
    """What a kernel does to its workspace, as memory.c does it for those of the aclnn door."""
    workspace.view().flatten().view(torch.int16)[: needed // 2].fill_(POISON)
