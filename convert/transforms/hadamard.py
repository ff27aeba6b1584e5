"""Rotations that cost additions only: randomized Hadamard matrices of the sizes of Qwen3.

A Hadamard matrix has entries 1 and -1 and orthogonal rows. There is one of every power of two
(Sylvester: [[H, H], [H, -H]]), and of order q + 1 or 2 (q + 1) for a prime q (Paley, "On orthogonal
matrices", 1933). Those of the sizes between are Kronecker products: 2560 is 20 * 128, 576 is
36 * 16. Entries that are known make it possible to multiply by additions in a fixed order, so that
every machine finds the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from blake3 import blake3
from torch import Tensor

from qwen3_ascend.errors import RecipeError
from qwen3_ascend.native import Kernels, RowStep

MOST_IN_BASE = 512
"""The largest factor that is no power of two: it costs as many additions for each weight."""


@dataclass(frozen=True)
class Rotation:
    """x to H (s * x) / sqrt(size) in each block of `size` neighbours; s are signs drawn by name.

    H = B (x) S: B is the `base` of order m, S Sylvester's of order size / m.

    Attributes:
        size: of a block.
        name: that the signs are drawn by.
    """

    size: int
    name: str

    @cached_property
    def signs(self) -> Tensor:
        """1 or -1 for each place of a block, float32 [size]: the bits of a hash, so that they are
        the same for every version of every library."""
        digest = blake3(f"{self.name} {self.size}".encode()).digest(length=-(-self.size // 8))
        bits = [digest[place // 8] >> place % 8 & 1 for place in range(self.size)]
        return torch.tensor(bits, dtype=torch.float32).mul_(-2.0).add_(1.0)

    @property
    def base(self) -> Tensor:
        """The factor of the matrix that is no power of two, float32 [m, m] of 1 and -1.

        Raises:
            RecipeError: if no Hadamard matrix of the size is known here.
        """
        return base_matrix(self.size)

    @property
    def matrix(self) -> Tensor:
        """The whole rotation R, float64 [size, size], for tests and for people: x becomes R x."""
        sylvester = torch.ones(1, 1, dtype=torch.float64)
        while len(sylvester) * len(self.base) < self.size:
            top = torch.cat([sylvester, sylvester], 1)
            sylvester = torch.cat([top, torch.cat([sylvester, -sylvester], 1)])
        whole: Tensor = torch.kron(self.base.double(), sylvester)
        return whole * self.signs.double() / math.sqrt(self.size)

    def of_inputs(self, inputs: int, factors: Tensor | None = None) -> RowStep:
        """The rotation of rows [K].

        Args:
            inputs: K, a multiple of the size.
            factors: float32 [K] that the inputs are multiplied by first.
        """
        signs = self.signs.repeat(inputs // self.size)  # exact, so one product does for both
        return RowStep(None, signs if factors is None else signs * factors, self.base, self.size)

    def of_outputs(self, weight: Tensor, kernels: Kernels, out: Tensor) -> None:
        """Rotates the columns of a float matrix [N, K] into a float32 one; N is a multiple of the
        size."""
        kernels.rotate_outputs(weight, self.signs, self.base, out)


@lru_cache
def base_matrix(size: int) -> Tensor:
    """The smallest B with size = m * 2^k: float32 [m, m], symmetric or not.

    Raises:
        RecipeError: if there is none.
    """
    order = size & -size
    order = size // order  # the odd part
    while size % order == 0 and order <= MOST_IN_BASE:
        if order == 1:
            return torch.ones(1, 1)
        if order % 4 == 0 and _is_prime(order - 1):
            return _first_paley(order - 1)
        if order % 4 == 0 and (order // 2 - 1) % 4 == 1 and _is_prime(order // 2 - 1):
            return _second_paley(order // 2 - 1)
        order *= 2
    raise RecipeError(
        f"no Hadamard matrix of size {size} is known: choose a recipe without the transform "
        f"rotate, such as w8a8-plain"
    )


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _jacobsthal(prime: int) -> Tensor:
    """[q, q]: whether the difference of row and column is a square modulo q; 1, -1, or 0 if 0."""
    squares = {value * value % prime for value in range(1, prime)}
    row = [0] + [1 if value in squares else -1 for value in range(1, prime)]
    return torch.tensor([[row[(i - j) % prime] for j in range(prime)] for i in range(prime)])


def _first_paley(prime: int) -> Tensor:
    """Of order q + 1, for q = 3 modulo 4."""
    skew = torch.zeros(prime + 1, prime + 1)
    skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, _jacobsthal(prime)
    return skew + torch.eye(prime + 1)


def _second_paley(prime: int) -> Tensor:
    """Of order 2 (q + 1), for q = 1 modulo 4."""
    symmetric = torch.zeros(prime + 1, prime + 1)
    symmetric[0, 1:], symmetric[1:, 0], symmetric[1:, 1:] = 1, 1, _jacobsthal(prime)
    sign, other = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    return torch.kron(symmetric, sign) + torch.kron(torch.eye(prime + 1), other)
