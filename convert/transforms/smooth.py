"""smooth: the difficulty of activations, moved into weights (SmoothQuant, arXiv 2211.10438).

s = max|x|^a / max|w|^(1 - a) for each input, divided by its geometric mean; a = 0.5 was the best of
what was measured, and all four places matter: norms alone leave the outliers of v and up.
"""

from __future__ import annotations

from torch import Tensor

from qwen3_ascend.convert.transforms.folding import Folding

ALPHA = 0.5
"""How much of the activations' range is moved."""

LEAST = 1e-5
"""Below this a range is taken for this: dead channels have none."""

MOST_FACTOR = 1e3


def smooth(folding: Folding, alpha: float = ALPHA) -> Folding:
    """A layer whose four linears read smoothed inputs.

    Args:
        folding: the layer, with the ranges of its inputs.
        alpha: 0 leaves the activations as they are, 1 makes their ranges alike.
    """
    layer, (mlp,) = folding.layer, folding.layer.mlps

    def factors(magnitude: Tensor, *names: str) -> Tensor:
        return smooth_factors(magnitude, folding.weight(*names).abs().amax(0), alpha)

    folding = folding.qkv(factors(folding.inputs.qkv.magnitude, *layer.attention_readers))
    folding = folding.gate_up(factors(folding.inputs.gate_up.magnitude, mlp.gate, mlp.up))
    magnitude = folding.heads(folding.inputs.output.magnitude).amax(0)
    largest = folding.heads(folding.weight(layer.output).abs().amax(0)).amax(0)
    folding = folding.output(smooth_factors(magnitude, largest, alpha))
    return folding.down(factors(folding.inputs.down.magnitude, mlp.down))


def smooth_factors(magnitude: Tensor, largest: Tensor, alpha: float = ALPHA) -> Tensor:
    """The factors by which inputs are divided, float32 [K].

    Args:
        magnitude: the largest |x| of each input, float32 [K].
        largest: the largest |w| of each input, float32 [K].
        alpha: see `smooth`.
    """
    of_weights = largest.clamp(min=LEAST) ** (1 - alpha)
    found = magnitude.clamp(min=LEAST) ** alpha / of_weights
    return (found / found.log().mean().exp()).clamp(1 / MOST_FACTOR, MOST_FACTOR)
