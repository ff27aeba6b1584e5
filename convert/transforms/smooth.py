"""smooth: a part of the magnitude of activations goes into the weights (SmoothQuant, Xiao et al.,
arXiv 2211.10438).

What a linear reads, x, is divided by a factor for each channel, and its weights are multiplied:

    s = sqrt(max|x| / max|w|), of geometric mean 1, within 1/1000 and 1000

so that the largest values of both come to the same. All four places count (measured: norms alone
leave a third of the loss): the gains of the two norms take the factors of q, k, v and of gate, up;
the rows of up those of down; and the rows of v those of o, which all query heads of a group share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from qwen3_ascend.convert.quantizers.base import Needs
from qwen3_ascend.convert.statistics import InputStatistics
from qwen3_ascend.convert.transforms.base import FittedTransform
from qwen3_ascend.convert.transforms.changes import Changes, Floats, Gain
from qwen3_ascend.convert.transforms.cle import shared_by
from qwen3_ascend.convert.transforms.parts import EndParts, LayerParts, ModelParts, Unit
from qwen3_ascend.native import Kernels

SMALLEST = 1e-5
"""What a magnitude counts at least: a channel that is always zero gets no factor without bound."""

MOST = 1e3


@dataclass(frozen=True)
class Smooth(FittedTransform):
    """See the module."""

    unties: bool = False
    needs: Needs = Needs.SQUARES

    @override
    def touches(self, model: ModelParts, unit: Unit) -> Mapping[str, int]:
        return dict.fromkeys(self.consults(model, unit), 1)

    @override
    def consults(self, model: ModelParts, unit: Unit) -> tuple[str, ...]:
        if isinstance(unit, EndParts):
            return ()
        norms = (unit.input_norm, unit.post_attention_norm)
        return (*norms, *unit.attention_readers, *unit.mlp_readers, *unit.writers)

    @override
    def change(
        self, model: ModelParts, unit: Unit, floats: Floats, changes: Changes, kernels: Kernels
    ) -> Changes:
        return changes

    @override
    def fit(
        self,
        model: ModelParts,
        layer: LayerParts,
        floats: Floats,
        changes: Changes,
        statistics: Mapping[str, InputStatistics],
        kernels: Kernels,
    ) -> Changes:
        def largest(*names: str) -> Tensor:
            found = [changes.weight(name, floats, kernels).float().abs().amax(0) for name in names]
            return torch.stack(found).amax(0)

        places = (
            (layer.input_norm, layer.attention_readers),
            (layer.post_attention_norm, layer.mlp_readers),
        )
        fitted = changes
        for norm, readers in places:
            factors = _factors(statistics[readers[0]].magnitude, largest(*readers))
            gain = changes.weight(norm, floats, kernels)[0].float()
            fitted = fitted.regained(norm, Gain.replacing(gain, gain / factors), *readers)
        shape = (model.num_kv_heads, -1, model.head_dim)
        inputs = statistics[layer.output].magnitude.view(shape).amax(1).flatten()
        columns = largest(layer.output).view(shape).amax(1).flatten()
        factors = _factors(inputs, columns)
        fitted = fitted.scaled("outputs", 1.0 / factors, layer.value)
        fitted = fitted.scaled("inputs", shared_by(factors, model), layer.output)
        for mlp in layer.mlps:
            factors = _factors(statistics[mlp.down].magnitude, largest(mlp.down))
            fitted = fitted.scaled("outputs", 1.0 / factors, mlp.up)
            fitted = fitted.scaled("inputs", factors, mlp.down)
        return fitted


def _factors(inputs: Tensor, columns: Tensor) -> Tensor:
    """Of magnitudes [K] of the inputs, and of the weights that read them."""
    ratio = (inputs.clamp_min(SMALLEST) / columns.clamp_min(SMALLEST)).sqrt()
    return (ratio / ratio.log().mean().exp()).clamp(1 / MOST, MOST)
