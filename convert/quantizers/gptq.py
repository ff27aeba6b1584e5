"""gptq: integers chosen one input after the other, where later ones make up for earlier errors.

The error of a weight w' in the place of w is that of the products, e H e' with e = w - w' and
H = E[x'x], which the Hessian of calibration tells. When an input has got its integer, the weights
of the inputs that are still free move so that this error becomes as small as it can. Frantar et
al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022), put
all that is needed into one triangular matrix U with U'U = inverse of H; for each input j in turn

    q_j = nearest(w_j);   error = (w_j - q_j) / U_jj;   w_k = w_k - error * U_jk   for all k > j

and found that the order need not depend on the output, so that outputs share U. The settings are
those that were measured to matter (docs/recipes.md):

 - scales by the search of `mse`, weighted by E[x^2], from the weights as they were: so groups are
   those of neighbouring inputs whatever the order, and need no tensor that tells the order;
 - inputs in the order of descending E[x^2], while most weights are free to make up for them;
 - 1 % of the mean of E[x^2] is added to each, and ten times as much should a pivot fail;
 - inputs that were always zero take part in nothing and get their nearest integers;
 - U is found in float64 and used in float32.

Inputs lie here in ascending order and are worked through from the back. So H = LL' with a lower L,
and U in the order of the work is the inverse of L seen from its last row and column: one Cholesky
factor and one triangular inverse, both in the place of H's copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from qwen3_ascend.checkpoint.schemes.grid import Grid
from qwen3_ascend.convert.quantizers.base import (
    Choose,
    Chosen,
    Needs,
    Quantizer,
    UselessStatistics,
)
from qwen3_ascend.convert.quantizers.mse import importance, searched_scales
from qwen3_ascend.convert.statistics import InputStatistics
from qwen3_ascend.native import Kernels
from qwen3_ascend.native.kernels import BLOCK_COLUMNS

DAMPING = (0.01, 0.1, 1.0, 10.0)
"""What is added to the diagonal, as a share of its mean; the next if a factor does not exist."""

PANEL = 256
"""Rows of a K x K matrix that are worked on together: temporaries are this wide."""


@dataclass(frozen=True)
class Gptq(Quantizer):
    """See the module."""

    needs: Needs = Needs.HESSIAN
    uses: Needs = Needs.HESSIAN

    @override
    def prepare(self, grid: Grid, statistics: InputStatistics | None, kernels: Kernels) -> Choose:
        if statistics is None or statistics.hessian is None:
            raise ValueError("GPTQ needs the Hessian of a linear's inputs")
        order = statistics.hessian.diagonal().argsort(stable=True)
        factor, counts = inverse_factor(statistics.hessian, order), importance(statistics)

        def choose(weight: Tensor) -> Chosen:
            scales = searched_scales(weight, grid, counts, kernels)
            return Chosen(compensated(weight, scales, grid, order, factor, kernels), scales)

        return choose

    @override
    def shared_bytes(self, inputs: int) -> int:
        """The factor, in the place of a float64 matrix, and panels of it; the Hessian is there."""
        return 8 * inputs * (inputs + 3 * PANEL)


def compensated(
    weight: Tensor, scales: Tensor, grid: Grid, order: Tensor, factor: Tensor, kernels: Kernels
) -> Tensor:
    """The integers, int8 [n, K], of float32 weights [n, K] under scales [n, G].

    Args:
        weight, scales, grid: what is quantized.
        order: of the inputs, int64 [K]; the last is the first to get its integer.
        factor: float32 [K, K], lower triangular, of inputs in that order; see `inverse_factor`.
        kernels: to choose with.
    """
    outputs, inputs = weight.shape
    group = order // grid.width(inputs)
    free, found = weight.index_select(1, order), weight.new_empty(weight.shape, dtype=torch.int8)
    for stop in range(inputs, 0, -BLOCK_COLUMNS):
        block = slice(max(stop - BLOCK_COLUMNS, 0), stop)
        # A kernel works forwards: a block is given to it, and taken from it, mirrored.
        weights, own = free[:, block].flip(1), factor[block, block].flip(0, 1)
        steps = scales.index_select(1, group[block].flip(0))
        codes, errors = torch.empty_like(weights, dtype=torch.int8), torch.empty_like(weights)
        kernels.compensate_block(weights, steps, own, (grid.least, grid.most), codes, errors)
        found[:, block] = codes.flip(1)
        free[:, : block.start].addmm_(errors.flip(1), factor[block, : block.start], alpha=-1)
    return found.index_select(1, order.argsort())


def inverse_factor(hessian: Tensor, order: Tensor) -> Tensor:
    """The inverse of the lower Cholesky factor of a damped Hessian.

    Args:
        hessian: float32 [K, K], positive semidefinite.
        order: of its inputs, int64 [K].

    Returns:
        float32 [K, K], lower triangular, W with W'W = inverse of H in this order. Its rows lie
        apart: it takes the memory of the one float64 matrix in which it was found.

    Raises:
        UselessStatistics: if even the largest damping does not help: it is not finite.
    """
    mean = float(hessian.diagonal().double().mean()) or 1.0
    matrix = torch.empty(hessian.shape, dtype=torch.float64)
    for damping in DAMPING:
        _copy_damped(hessian, order, damping * mean, matrix)
        # LAPACK works on columns: the upper factor of the transposed view is the lower one here.
        columns, info = matrix.mT, torch.empty((), dtype=torch.int32)
        torch.linalg.cholesky_ex(columns, upper=True, out=(columns, info))
        if not info:
            _invert_lower(matrix)
            return _narrowed(matrix)
    raise UselessStatistics("the Hessian of its inputs has no Cholesky factor: it is not finite")


def _copy_damped(hessian: Tensor, order: Tensor, damping: float, matrix: Tensor) -> None:
    """Writes the Hessian in an order, with more on its diagonal. An input that was always zero is
    then one that no other depends on."""
    for rows in _panels(len(order)):
        matrix[rows] = hessian.index_select(0, order[rows]).index_select(1, order)
    matrix.diagonal().add_(damping)


def _invert_lower(matrix: Tensor) -> None:
    """Turns a lower triangular matrix [K, K] into its inverse, in place."""
    for rows in _panels(len(matrix)):
        own = matrix[rows, rows]
        inverse = torch.linalg.solve_triangular(own, torch.eye(len(own)).double(), upper=False)
        for columns in _panels(rows.start):
            # Of the inverse's rows above, those of other columns are zero.
            between = slice(columns.start, rows.start)
            product = matrix[rows, between] @ matrix[between, columns]
            matrix[rows, columns] = (inverse @ product).neg_()
        own.copy_(inverse)


def _narrowed(matrix: Tensor) -> Tensor:
    """float64 [K, K] as float32, each row in the place of its own first half."""
    narrow = matrix.view(torch.float32)[:, : matrix.shape[1]]
    for rows in _panels(len(matrix)):
        narrow[rows] = matrix[rows].float()
    return narrow


def _panels(length: int) -> Iterator[slice]:
    """[0, length) in slices."""
    for start in range(0, length, PANEL):
        yield slice(start, min(start + PANEL, length))
