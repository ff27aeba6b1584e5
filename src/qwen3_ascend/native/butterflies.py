"""Rotations by randomized Hadamard matrices in torch: the definition of their bits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK_WEIGHTS = 1 << 18
"""Weights that are rotated together: their copies stay near ten megabytes."""


def check_rotation(matrix: Tensor, axis: int, signs: Tensor, base: Tensor) -> None:
    """Raise ValueError unless the arguments are what `Kernels.rotate_inputs` (axis 1) or
    `rotate_outputs` (axis 0) takes."""
    size, order = signs.numel(), base.shape[0]
    doublings = size // max(order, 1)
    for name, tensor in (("matrix", matrix), ("signs", signs), ("base", base)):
        if tensor.dtype is not torch.float32 or tensor.device.type != "cpu":
            raise ValueError(f"{name} must be float32 on the CPU, not {tensor.dtype}")
        if tensor.dim() != (1 if tensor is signs else 2) or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, and not {list(tensor.shape)}")
    if base.shape[1] != order or order * doublings != size or doublings & doublings - 1:
        raise ValueError(f"a base of {list(base.shape)} does not make a rotation of {size}")
    if size == 0 or matrix.shape[axis] % size:
        raise ValueError(f"{list(matrix.shape)} has no whole blocks of {size} along axis {axis}")


def rotate(matrix: Tensor, axis: int, signs: Tensor, base: Tensor) -> None:
    """Rotates blocks of rows (axis 1) or of columns (axis 0) in place; see `Kernels`."""
    check_rotation(matrix, axis, signs, base)
    size = len(signs)
    other = matrix.shape[1 - axis]
    step = max(1, BLOCK_WEIGHTS // max(1, matrix.shape[axis]))
    for start in range(0, other, step):
        part = matrix.narrow(1 - axis, start, min(step, other - start))
        if axis == 1:
            blocks = part.unflatten(1, (-1, size))
            blocks.copy_(_rotated(blocks, signs, base))
        else:
            blocks = part.unflatten(0, (-1, size)).transpose(1, 2)
            blocks.copy_(_rotated(blocks, signs, base))


def _rotated(x: Tensor, signs: Tensor, base: Tensor) -> Tensor:
    """[..., S]: each step is elementwise, so that no processor can add in another order."""
    size, order = len(signs), len(base)
    x = x * signs
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
