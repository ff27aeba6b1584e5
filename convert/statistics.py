"""What calibration has seen of the inputs of a linear."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3_ascend.checkpoint.schemes import InputRange
from qwen3_ascend.convert.triangle import Triangle


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """Of the inputs x [T, K] of one linear, over all tokens of the calibration data.

    Attributes:
        tokens: T.
        least, largest: float32 [K], the range of each input.
        mean_magnitude: float32 [K], the mean of |x|.
        mean_square: float32 [K], the mean of x^2, which is the diagonal of the Hessian.
        hessian: x'x / T, float32, symmetric; None if nobody has asked for it.
    """

    tokens: int
    least: Tensor
    largest: Tensor
    mean_magnitude: Tensor
    mean_square: Tensor
    hessian: Triangle | None = None

    @property
    def is_finite(self) -> bool:
        """Whether every input and its square is a number in float32; of others nothing can be
        made."""
        seen = (self.least, self.largest, self.mean_square)
        return all(bool(torch.isfinite(each).all()) for each in seen)

    @property
    def range(self) -> InputRange:
        """Of all inputs together."""
        return InputRange(float(self.least.min()), float(self.largest.max()))

    @property
    def magnitude(self) -> Tensor:
        """The largest |x| of each input, float32 [K]."""
        return -self.least.minimum(-self.largest)

    def divided(self, factors: Tensor) -> InputStatistics:
        """The statistics of x / factors, factors being positive [K]."""
        hessian = self.hessian
        return InputStatistics(
            self.tokens,
            self.least / factors,
            self.largest / factors,
            self.mean_magnitude / factors,
            self.mean_square / factors.square(),
            None if hessian is None else hessian.divided(factors),
        )


Seen = tuple[InputStatistics | None, ...]
"""Of the inputs of each matrix of a linear: the only one, or those of the experts. None for an
expert that no token was given to."""


def are_finite(seen: Seen) -> bool:
    """Whether everything that was seen is a number; see InputStatistics."""
    return all(known is None or known.is_finite for known in seen)
