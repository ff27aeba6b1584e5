"""Keys and values of all layers in blocks, in plain order: the form that both devices use.

On a CPU they may be kept as int8 codes with a scale for each token and head, found when they are
written: half the memory, and half of what a long context reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3_ascend.checkpoint.config import Qwen3Config

SCRATCH_BLOCK = 0
"""Never given to a request: padding rows of a captured batch write here."""


SCALE = torch.float32
"""Type of the scales of codes."""


@dataclass(frozen=True)
class LayerKV:
    """Keys and values of one layer.

    Attributes:
        keys, values: each [blocks, block_size, kv_heads, head_dim]: floats, or int8 codes.
        key_scales, value_scales: float32 [blocks, block_size, kv_heads] of codes; None of floats.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None


def cache_shape(config: Qwen3Config, num_blocks: int, block_size: int) -> tuple[int, int, int, int]:
    """Shape of the keys of a layer, and of its values."""
    return num_blocks, block_size, config.num_kv_heads, config.head_dim


def bytes_per_token(config: Qwen3Config, dtype: torch.dtype) -> int:
    """Cache bytes of one token over all layers; int8 codes have scales."""
    scale = SCALE.itemsize if dtype == torch.int8 else 0
    return 2 * config.num_layers * config.num_kv_heads * (config.head_dim * dtype.itemsize + scale)
