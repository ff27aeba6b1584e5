"""mse: of each group the scale that leaves the least squared error, and the nearest integers.

A scale under which nothing is clipped spends the integers on the few largest weights. A smaller one
clips those and lies closer to all others; a larger one may round better, above all where it is
signed and the largest weight lies on the least integer. So some shares of the widest scale are
tried, each rounded to bfloat16 first, and the one with the least error counts:

    scale = argmin over s = bf16(ratio * widest) of sum_k E[x_k^2] * (w_k - s * q(w_k / s))^2

Without calibration E[x^2] is 1 everywhere, and the result is the same on every machine: the search
uses elementwise float32 operations and sums in a fixed order (`Kernels.search_scales`).

Where the idea comes from: the clipping search of OmniQuant and AWQ, and llama.cpp's importance
matrix. The ratios are measured ones: see docs/recipes.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from qwen3_ascend.checkpoint.schemes.grid import Grid
from qwen3_ascend.convert.quantizers.base import Choose, Chosen, Needs, Quantizer
from qwen3_ascend.convert.statistics import InputStatistics
from qwen3_ascend.native import Kernels

FEW_BITS = 4

COARSE = tuple(step / 40 for step in (*range(42, 21, -1), 20))
"""Ratios for few integers: 1.05, 1.025, ... 0.55, and 0.5."""

FINE = tuple(step / 50 for step in range(50, 40, -1))
"""Ratios for more integers, of which clipping saves little: 1, 0.98, ... 0.82."""

UNSEEN = 0.01
"""What an input counts that was always zero, of the mean of all: as GPTQ's damping does."""


@dataclass(frozen=True)
class Mse(Quantizer):
    """See the module; uses E[x^2] if there is data."""

    needs: Needs = Needs.NOTHING
    uses: Needs = Needs.SQUARES

    @override
    def prepare(self, grid: Grid, statistics: InputStatistics | None, kernels: Kernels) -> Choose:
        counts = importance(statistics)

        def choose(weight: Tensor) -> Chosen:
            scales = searched_scales(weight, grid, counts, kernels)
            return Chosen(grid.nearest(weight, scales), scales)

        return choose

    @override
    def shared_bytes(self, inputs: int) -> int:
        return 0


def searched_scales(weight: Tensor, grid: Grid, counts: Tensor | None, kernels: Kernels) -> Tensor:
    """The scales of least error; see the module.

    Args:
        weight: float32 [n, K], finite.
        grid: the integers that there are.
        counts: what a squared error of each input counts, float32 [K]; None if all count the same.
        kernels: to search with.

    Returns:
        float32 [n, G].
    """
    outputs, inputs = weight.shape
    ratios = torch.tensor(COARSE if grid.bits <= FEW_BITS else FINE)
    scales = weight.new_empty(outputs, grid.groups(inputs))
    counts = weight.new_ones(inputs) if counts is None else counts
    integers = (grid.least, grid.most)
    kernels.search_scales(weight, counts, grid.width(inputs), integers, ratios, scales)
    return scales


def importance(statistics: InputStatistics | None) -> Tensor | None:
    """What a squared error of each input counts, float32 [K]: E[x^2]; None if nothing is known."""
    if statistics is None or not bool(statistics.mean_square.any()):
        return None
    squares = statistics.mean_square
    return torch.where(squares == 0, UNSEEN * squares.mean(), squares)
