"""The paged key/value cache: who owns which block (host only), and the blocks themselves."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3_ascend.checkpoint.model import Qwen3Config

DEFAULT_BLOCK_SIZE = 128
"""Tokens of a block. Of the sizes Ascend's attention kernels take, the one that all of them take
(npu_fused_infer_attention_score: multiples of 128 for prefill, 128 recommended for decode)."""

SCRATCH_BLOCK = 0
"""Never given to a sequence: padding rows of a captured batch write here."""


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


@dataclass(frozen=True)
class LayerKV:
    """Keys and values of one layer: each [blocks, block_size, kv_heads, head_dim]."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class PagedKVCache:
    """Keys and values of all layers, in blocks of `block_size` tokens."""

    layers: tuple[LayerKV, ...]
    block_size: int

    @classmethod
    def allocate(
        cls,
        config: Qwen3Config,
        num_blocks: int,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> PagedKVCache:
        """Uninitialised memory, since a slot is written before it is read; but padding rows read
        any slot of the scratch block, so that one is zero."""
        shape = (num_blocks, block_size, config.num_kv_heads, config.head_dim)

        def blocks() -> Tensor:
            empty = torch.empty(shape, dtype=dtype, device=device)
            empty[SCRATCH_BLOCK].zero_()
            return empty

        layers = tuple(LayerKV(blocks(), blocks()) for _ in range(config.num_layers))
        return cls(layers, block_size)


def bytes_per_token(config: Qwen3Config, dtype: torch.dtype) -> int:
    """Cache bytes of one token over all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize
