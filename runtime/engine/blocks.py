"""Who owns which block of the paged key/value cache. Host only: no torch, no device."""

from __future__ import annotations

from collections import deque

from qwen3_ascend.runtime.backends.cache import SCRATCH_BLOCK


class BlockAllocator:
    """Hands out block numbers. Invariant: every block is free, owned once, or the scratch block."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """Blocks 1 to num_blocks - 1 are free, block 0 is scratch."""
        self.num_blocks, self.block_size = num_blocks, block_size
        self._free = deque(range(SCRATCH_BLOCK + 1, num_blocks))
        self._owned: dict[int, list[int]] = {}

    @property
    def free_blocks(self) -> int:
        """Blocks that can be reserved."""
        return len(self._free)

    @property
    def capacity(self) -> int:
        """Tokens that fit when nothing is reserved."""
        return (self.num_blocks - 1) * self.block_size

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-tokens // self.block_size)

    def can_reserve(self, tokens: int) -> bool:
        """Whether blocks for so many tokens are free."""
        return self.blocks_for(tokens) <= len(self._free)

    def reserve(self, owner: int, tokens: int) -> list[int]:
        """Gives `owner` blocks for so many tokens; the caller has asked `can_reserve`."""
        assert owner not in self._owned and self.can_reserve(tokens)
        blocks = [self._free.popleft() for _ in range(self.blocks_for(tokens))]
        self._owned[owner] = blocks
        return list(blocks)

    def release(self, owner: int) -> None:
        """Takes the blocks of `owner` back; none if it owns none."""
        self._free.extend(self._owned.pop(owner, ()))

    def check_integrity(self) -> None:
        """AssertionError if a block was lost or is owned twice."""
        owned = [block for blocks in self._owned.values() for block in blocks]
        assert sorted([*owned, *self._free]) == list(range(SCRATCH_BLOCK + 1, self.num_blocks))
