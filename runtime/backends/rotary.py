"""Rotary position embedding: frequencies, and the cosines and sines of positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qwen3_ascend.checkpoint.config import Qwen3Config, RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position of each pair, float32 [head_dim / 2].

    theta^(-2i/d), and for yarn the blend of it with the same divided by the factor (arXiv
    2309.00071, section 3.2: "NTK-by-parts"), as transformers computes it.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    plain = 1.0 / rope.theta**exponents
    if rope.type == "default":
        return plain
    low, high = _correction_range(rope, head_dim)
    ramp = ((torch.arange(head_dim // 2).float() - low) / (high - low)).clamp(0, 1)
    return plain / rope.factor * ramp + plain * (1 - ramp)


def _correction_range(rope: RopeConfig, head_dim: int) -> tuple[float, float]:
    """The pairs between which yarn goes over from keeping to stretching a frequency."""

    def pair_with(rotations: float) -> float:
        wavelength = rope.original_max_position / (rotations * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return low, high + 0.001 if low == high else high


def rotary_tables(config: Qwen3Config) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position, float32 [context, head_dim]; see `rotary_rows`."""
    frequencies = inverse_frequencies(config.rope, config.head_dim)
    return rotary_rows(
        torch.arange(config.context_length), frequencies, config.rope.attention_factor
    )


def rotary_rows(positions: Tensor, frequencies: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of some positions, float32 [T, head_dim], halves repeated.

    Args:
        positions: integers [T].
        frequencies: of `inverse_frequencies`, [head_dim / 2].
        factor: by which yarn scales attention; 1 without it.
    """
    angles = torch.outer(positions.float(), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * factor, angles.sin() * factor
