"""What every quantizer promises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from torch import Tensor

from qwen3_ascend.checkpoint.schemes.grid import Grid
from qwen3_ascend.convert.statistics import InputStatistics
from qwen3_ascend.native import Kernels


class Needs(IntEnum):
    """What is to be known of the inputs of a linear; each includes those before it."""

    NOTHING = 0
    SQUARES = 1
    """The mean of x^2 and the range of each input."""

    HESSIAN = 2
    """x'x."""


@dataclass(frozen=True, eq=False)
class Chosen:
    """What stands for a weight [N, K].

    Attributes:
        integers: int8 [N, K], within the grid.
        scales: float32 [N, G], each exactly representable in bfloat16 and none of them zero.
    """

    integers: Tensor
    scales: Tensor


class UselessStatistics(ValueError):
    """Statistics of which a quantizer can make nothing; the text says why."""


Choose = Callable[[Tensor], Chosen]
"""Some outputs of a linear, float32 [n, K] and finite, to what stands for them. Outputs are
independent of each other, so that a linear may be divided along them."""


class Quantizer(Protocol):
    """An algorithm that finds integers and scales.

    Attributes:
        needs: what it cannot do without.
        uses: what it makes use of if it is there.
    """

    needs: Needs
    uses: Needs

    def prepare(self, grid: Grid, statistics: InputStatistics | None, kernels: Kernels) -> Choose:
        """Does once what all outputs of a linear share.

        Args:
            grid: the integers that there are.
            statistics: of the linear's inputs, with what the quantizer needs at least; None if it
                needs nothing and nothing is known.
            kernels: to work with; no byte depends on which.

        Raises:
            UselessStatistics: if nothing can be made of them.
        """

    def shared_bytes(self, inputs: int) -> int:
        """Memory that preparing for so many inputs takes at most, and `Choose` keeps."""
