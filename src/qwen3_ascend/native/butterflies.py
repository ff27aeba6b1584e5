"""Steps of rows and rotations of outputs in torch: the definition of their bits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qwen3_ascend.native.rows import Steps

BLOCK_WEIGHTS = 1 << 18
"""Weights that are rotated together: their copies stay near ten megabytes."""


def changed(rows: Tensor, steps: Steps) -> Tensor:
    """Rows [N, K] of any float type after some steps, float32; see `Kernels.change_rows`."""
    x = rows.float()
    for step in steps:
        if step.outputs is not None:
            x = x * step.outputs[:, None]
        if step.inputs is not None:
            x = x * step.inputs
        if step.base is not None:
            x = _rotated(x.unflatten(1, (-1, step.size)), step.base).flatten(1)
    return x


def rotate_outputs(source: Tensor, signs: Tensor, base: Tensor, out: Tensor) -> None:
    """See `Kernels.rotate_outputs`."""
    rows, columns = source.shape
    step = max(1, BLOCK_WEIGHTS // max(1, rows))
    for start in range(0, columns, step):
        span = slice(start, start + step)
        blocks = source[:, span].float().unflatten(0, (-1, len(signs))).transpose(1, 2)
        out[:, span] = _rotated(blocks * signs, base).transpose(1, 2).flatten(0, 1)


def _rotated(x: Tensor, base: Tensor) -> Tensor:
    """[..., S]: each step is elementwise, so that no processor can add in another order."""
    size, order = x.shape[-1], len(base)
    apart = 1
    while apart * order < size:
        pairs = x.unflatten(-1, (-1, 2, apart))
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack((first + second, first - second), -2).flatten(-3)
        apart *= 2
    if order > 1:
        x = _times_base(x.unflatten(-1, (order, apart)), base).flatten(-2)
    return x * (1.0 / math.sqrt(size))


def _times_base(x: Tensor, base: Tensor) -> Tensor:
    """[..., M, 2^k]: rows of the base, added from the first column to the last."""
    rows = []
    for signs in base.tolist():
        total = x[..., 0, :] * signs[0]
        for place in range(1, len(signs)):
            total = total + x[..., place, :] * signs[place]
        rows.append(total)
    return torch.stack(rows, -2)
