"""Symmetric and triangular matrices of which one half is kept: for E[x'x], and for its factors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 512
"""Rows of a block: temporaries are this high. Products of fewer rows take longer in a BLAS."""


def triangle_bytes(size: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of the half of a matrix [size, size] at most."""
    return size * (size + ROWS) // 2 * dtype.itemsize


@dataclass(frozen=True, eq=False)
class Triangle:
    """The lower half of a matrix [K, K]: half the memory, and half the work of a product.

    Attributes:
        blocks: of each ROWS rows one after the other (the last may be fewer), what is left of and
            in the square block on the diagonal, [rows, columns]. Of a symmetric matrix that square
            is whole, of a triangular one its upper half is zero.
    """

    blocks: list[Tensor]

    @classmethod
    def zeros(
        cls, size: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Triangle:
        """Of a matrix [size, size] of zeros."""
        spans = [(start, min(start + ROWS, size)) for start in range(0, size, ROWS)]
        return cls([
            torch.zeros(stop - start, stop, dtype=dtype, device=device) for start, stop in spans
        ])  # fmt: skip

    @classmethod
    def of(cls, matrix: Tensor) -> Triangle:
        """A copy of the lower half of a matrix [K, K]."""
        made = cls.zeros(len(matrix), matrix.dtype, matrix.device)
        for rows, block in made:
            block.copy_(matrix[rows, : rows.stop])
        return made

    def __len__(self) -> int:
        """K."""
        return self.blocks[-1].shape[1] if self.blocks else 0

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """The rows of each block, and the block."""
        for block in self.blocks:
            yield slice(block.shape[1] - block.shape[0], block.shape[1]), block

    def whole(self) -> Tensor:
        """The symmetric matrix [K, K]."""
        return self.rows(torch.arange(len(self)))

    def rows(self, chosen: Tensor) -> Tensor:
        """Some rows of the symmetric matrix, [n, K], in an order; chosen is int64 [n]."""
        found = self.blocks[0].new_empty(len(chosen), len(self))
        for rows, block in self:
            above, inside = chosen < rows.start, (rows.start <= chosen) & (chosen < rows.stop)
            found[above, rows] = block[:, chosen[above]].t()
            found[inside, : rows.stop] = block[chosen[inside] - rows.start]
        return found

    def diagonal(self) -> Tensor:
        """[K], a copy."""
        return torch.cat([block.diagonal(rows.start) for rows, block in self])

    def add_products(self, x: Tensor) -> None:
        """Adds x'x of x [T, K]."""
        for rows, block in self:
            block.addmm_(x[:, rows].t(), x[:, : rows.stop])

    def mean(self, count: int) -> Triangle:
        """A sum of so many products as their mean, on the CPU; in place if it is there already."""
        return Triangle([block.cpu().div_(count) for block in self.blocks])

    def energy(self, vectors: Tensor) -> float:
        """The sum of e H e' over the rows e of a matrix [n, K], H being symmetric."""
        total = 0.0
        for rows, block in self:
            own = vectors[:, rows]
            twice = vectors[:, : rows.stop].clone()
            twice[:, : rows.start] *= 2
            total += float(((own @ block) * twice).sum())
        return total

    def divided(self, factors: Tensor) -> Triangle:
        """H_jk / (factors_j factors_k), factors [K]."""
        return Triangle([
            block / factors[: rows.stop] / factors[rows, None] for rows, block in self
        ])  # fmt: skip
