"""Keys and values of all layers in blocks, in plain order: the form that both devices use."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3_ascend.checkpoint.config import Qwen3Config

SCRATCH_BLOCK = 0
"""Never given to a request: padding rows of a captured batch write here."""


@dataclass(frozen=True)
class LayerKV:
    """Keys and values of one layer: each [blocks, block_size, kv_heads, head_dim]."""

    keys: Tensor
    values: Tensor


def allocate_layers(
    config: Qwen3Config,
    num_blocks: int,
    block_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[LayerKV, ...]:
    """Zeros: a kernel may load a whole block and multiply what lies behind a request's last token
    by a probability of 0, which gives NaN for a NaN that lies there."""
    shape = (num_blocks, block_size, config.num_kv_heads, config.head_dim)

    def blocks() -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return tuple(LayerKV(blocks(), blocks()) for _ in range(config.num_layers))


def bytes_per_token(config: Qwen3Config, dtype: torch.dtype) -> int:
    """Cache bytes of one token over all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize
