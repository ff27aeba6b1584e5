"""awq: inputs that matter, made large before weights are rounded (AWQ, arXiv 2306.00978).

s = mean|x|^r for each input; of some r between 0 and 1 that one whose quantized weights lose least
at the linear's output. With the Hessian H = x'x / T that loss is exact: the trace of D H D', D
being what rounding the scaled weight does, scaled back.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qwen3_ascend.convert.statistics import InputStatistics
from qwen3_ascend.convert.transforms.folding import Folding

RATIOS = 11
"""Exponents that are tried, from 0 to 1."""

LEAST = 1e-5
"""Below this a mean is taken for this: dead channels have none."""

ROWS_AT_A_TIME = 1024

Rounded = Callable[[Tensor, Tensor], Tensor]
"""What quantization makes of outputs, float32 [n, K], whose inputs have the mean squares [K]: the
weights that the codes stand for, float32 [n, K]."""


def awq(folding: Folding, rounded: Rounded) -> Folding:
    """A layer whose four linears are scaled before they are rounded.

    Args:
        folding: the layer, with the means of its inputs, and their Hessians if there are any.
        rounded: how its linears are quantized.
    """
    layer, (mlp,) = folding.layer, folding.layer.mlps

    def factors(inputs: InputStatistics, *names: str) -> Tensor:
        return awq_factors(inputs, folding.weight(*names), inputs.mean_magnitude, rounded)

    inputs = folding.inputs.output
    mean = folding.heads(inputs.mean_magnitude).mean(0)
    found = awq_factors(inputs, folding.weight(layer.output), mean, rounded, folding.spread)
    folding = folding.output(found)
    folding = folding.qkv(factors(folding.inputs.qkv, *layer.attention_readers))
    folding = folding.down(factors(folding.inputs.down, mlp.down))
    return folding.gate_up(factors(folding.inputs.gate_up, mlp.gate, mlp.up))


def awq_factors(
    inputs: InputStatistics,
    weight: Tensor,
    mean: Tensor,
    rounded: Rounded,
    spread: Callable[[Tensor], Tensor] = lambda factors: factors,
) -> Tensor:
    """The factors by which inputs are divided, float32 [C].

    Args:
        inputs: of the linear.
        weight: float32 [N, K].
        mean: the mean |x| of each channel, float32 [C].
        rounded: how the linear is quantized.
        spread: factors of channels to those of the inputs [K], where inputs share channels.
    """
    best, least = torch.ones_like(mean), float("inf")
    for ratio in torch.linspace(0, 1, RATIOS).tolist():
        found = mean.clamp(min=LEAST) ** ratio
        found = found / (found.max() * found.min()).sqrt()
        error = _error(inputs, weight, spread(found), rounded)
        if error < least:
            best, least = found, error
    return best


def _error(inputs: InputStatistics, weight: Tensor, factors: Tensor, rounded: Rounded) -> float:
    """The mean square error of the linear's outputs, summed over them."""
    squares, total = inputs.mean_square / factors.square(), 0.0
    for rows in weight.split(ROWS_AT_A_TIME):
        lost = rounded(rows * factors, squares) / factors - rows
        if inputs.hessian is None:
            total += float((lost.square() * inputs.mean_square).sum())
        else:
            total += inputs.hessian.energy(lost)
    return total
