"""Rows that are changed as they are read: what a kernel does before its own work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RowStep:
    """A row x becomes R (x * factor of the row * factors of the columns), in this order.

    Attributes:
        outputs: factor of each row, float32 [N]; None for 1.
        inputs: factor of each column, float32 [K]; None for 1. If there is a rotation, they are
            there, and hold its signs as well.
        base: of the rotation R of each block of `size` neighbours, float32 [M, M] of 1 and -1,
            size = M * 2^k; None for no rotation. See `Kernels.change_rows`.
        size: of such a block.
    """

    outputs: Tensor | None = None
    inputs: Tensor | None = None
    base: Tensor | None = None
    size: int = 1

    def of(self, rows: slice) -> RowStep:
        """The same for some of the rows."""
        return self if self.outputs is None else replace(self, outputs=self.outputs[rows])


Steps = Sequence[RowStep]


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a weight, and what has to be done to them before they are what is wanted.

    Attributes:
        source: a float matrix [N, K].
        steps: one after the other.
    """

    source: Tensor
    steps: tuple[RowStep, ...] = ()

    def __len__(self) -> int:
        return self.source.shape[0]

    def part(self, start: int, stop: int) -> Rows:
        """Some of the rows: a view."""
        rows = slice(start, stop)
        return Rows(self.source[rows], tuple(step.of(rows) for step in self.steps))


def check_rotation(length: int, size: int, base: Tensor) -> None:
    """Raise ValueError unless a base makes a rotation of blocks of `size`, of which there is a
    whole number in `length`."""
    order = base.shape[0]
    doublings = size // max(order, 1)
    check_factors("base", base, (order, order))
    if order * doublings != size or doublings & doublings - 1:
        raise ValueError(f"a base of {list(base.shape)} does not make a rotation of {size}")
    if size == 0 or length % size:
        raise ValueError(f"{length} places are no whole blocks of {size}")


def check_steps(shape: Sequence[int], steps: Steps) -> None:
    """Raise ValueError unless the rows of a matrix of that shape can take the steps."""
    rows, columns = shape
    for step in steps:
        if step.outputs is not None:
            check_factors("outputs", step.outputs, (rows,))
        if step.inputs is not None:
            check_factors("inputs", step.inputs, (columns,))
        if step.base is not None:
            check_rotation(columns, step.size, step.base)
            if step.inputs is None:
                raise ValueError("a rotation has signs: they are in the factors of the inputs")


def check_factors(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless a tensor is float32 of a shape on the CPU, contiguous."""
    if tensor.dtype is not torch.float32 or tensor.device.type != "cpu":
        raise ValueError(f"{name} must be float32 on the CPU, not {tensor.dtype}")
    if tuple(tensor.shape) != shape or not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous {shape}, not {list(tensor.shape)}")
