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
factor and one triangular inverse, both in the place of H's copy. Of all these matrices one half is
kept, in blocks of rows; what is done with them are products of such blocks.
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
from qwen3_ascend.convert.triangle import ROWS, Triangle, triangle_bytes
from qwen3_ascend.native import Kernels
from qwen3_ascend.native.kernels import BLOCK_COLUMNS

DAMPING = (0.01, 0.1, 1.0, 10.0)
"""What is added to the diagonal, as a share of its mean; the next if a factor does not exist."""


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
        """One half of a float64 matrix, and blocks of rows of it; the Hessian is there."""
        return triangle_bytes(inputs, torch.float64) + 3 * ROWS * inputs * torch.float64.itemsize


def compensated(
    weight: Tensor, scales: Tensor, grid: Grid, order: Tensor, factor: Triangle, kernels: Kernels
) -> Tensor:
    """The integers, int8 [n, K], of float32 weights [n, K] under scales [n, G].

    Args:
        weight, scales, grid: what is quantized.
        order: of the inputs, int64 [K]; the last is the first to get its integer.
        factor: float32, triangular, of inputs in that order; see `inverse_factor`.
        kernels: to choose with.
    """
    outputs, inputs = weight.shape
    group = order // grid.width(inputs)
    free, found = weight.index_select(1, order), weight.new_empty(weight.shape, dtype=torch.int8)
    for block, factors in _in_order_of_work(factor):
        # A kernel works forwards: a block is given to it, and taken from it, mirrored.
        weights, own = free[:, block].flip(1), factors[:, block].flip(0, 1)
        steps = scales.index_select(1, group[block].flip(0))
        codes, errors = torch.empty_like(weights, dtype=torch.int8), torch.empty_like(weights)
        kernels.compensate_block(weights, steps, own, (grid.least, grid.most), codes, errors)
        found[:, block] = codes.flip(1)
        free[:, : block.start].addmm_(errors.flip(1), factors[:, : block.start], alpha=-1)
    return found.index_select(1, order.argsort())


def _in_order_of_work(factor: Triangle) -> Iterator[tuple[slice, Tensor]]:
    """Inputs that a kernel takes together, the last ones first, and their rows of a factor."""
    for rows, block in reversed([*factor]):
        for start in reversed(range(rows.start, rows.stop, BLOCK_COLUMNS)):
            columns = slice(start, min(start + BLOCK_COLUMNS, rows.stop))
            yield columns, block[start - rows.start : columns.stop - rows.start]


def inverse_factor(hessian: Triangle, order: Tensor) -> Triangle:
    """The inverse of the lower Cholesky factor of a damped Hessian.

    Args:
        hessian: float32, positive semidefinite.
        order: of its inputs, int64 [K].

    Returns:
        float32, triangular, W with W'W = inverse of H in this order.

    Raises:
        UselessStatistics: if even the largest damping does not help: it is not finite.
    """
    mean = float(hessian.diagonal().double().mean()) or 1.0
    matrix = Triangle.zeros(len(order), torch.float64)
    for damping in DAMPING:
        _copy_damped(hessian, order, damping * mean, matrix)
        if _factorize(matrix):
            _invert(matrix)
            return _narrowed(matrix)
    raise UselessStatistics("the Hessian of its inputs has no Cholesky factor: it is not finite")


def _copy_damped(hessian: Triangle, order: Tensor, damping: float, matrix: Triangle) -> None:
    """Writes the Hessian in an order, with more on its diagonal. An input that was always zero is
    then one that no other depends on."""
    for rows, block in matrix:
        chosen = order[rows].split(BLOCK_COLUMNS)
        for part, inputs in zip(block.split(BLOCK_COLUMNS), chosen, strict=True):
            part.copy_(hessian.rows(inputs).index_select(1, order[: rows.stop]))
        block.diagonal(rows.start).add_(damping)


def _factorize(matrix: Triangle) -> bool:
    """Turns a symmetric matrix into its lower Cholesky factor, in place; False if there is none."""
    for number, (rows, block) in enumerate(matrix):
        for above, factor in [*matrix][:number]:
            # What the columns before have to do with these is known; the rest is for their square.
            before, own = slice(0, above.start), block[:, above]
            own.addmm_(block[:, before], factor[:, before].t(), alpha=-1)
            solved = torch.linalg.solve_triangular(factor[:, above], own.t(), upper=False)
            own.copy_(solved.t())
        left, square = block[:, : rows.start], block[:, rows]
        square.addmm_(left, left.t(), alpha=-1)
        factor, info = torch.linalg.cholesky_ex(square)
        if info:
            return False
        square.copy_(factor)
    return True


def _invert(matrix: Triangle) -> None:
    """Turns a lower triangular matrix into its inverse, in place."""
    for number, (rows, block) in enumerate(matrix):
        left, square = block[:, : rows.start], block[:, rows]
        unit = torch.eye(len(square), dtype=square.dtype)
        inverse = torch.linalg.solve_triangular(square, unit, upper=False)
        inverses = [*matrix][:number]
        for first, (columns, _) in enumerate(inverses):
            product = torch.zeros_like(left[:, columns])
            for above, inverted in inverses[first:]:
                product.addmm_(left[:, above], inverted[:, columns])
            left[:, columns] = (inverse @ product).neg_()
        square.copy_(inverse)


def _narrowed(matrix: Triangle) -> Triangle:
    """float64 as float32; each block goes when it is not needed any more."""
    for number, block in enumerate(matrix.blocks):
        matrix.blocks[number] = block.float()
    return matrix
