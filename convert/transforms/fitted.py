"""Transforms that have to know what the linears of a layer are fed: smooth and awq.

They come after those that need no data, because calibration sees a layer as those leave it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from typing_extensions import override

from qwen3_ascend.convert.quantizers.base import Needs
from qwen3_ascend.convert.transforms.awq import Rounded, awq
from qwen3_ascend.convert.transforms.base import Transform
from qwen3_ascend.convert.transforms.changes import Changes, Floats
from qwen3_ascend.convert.transforms.folding import Folding
from qwen3_ascend.convert.transforms.parts import EndParts, ModelParts, Unit
from qwen3_ascend.convert.transforms.smooth import smooth
from qwen3_ascend.errors import RecipeError
from qwen3_ascend.native import Kernels


@dataclass(frozen=True)
class FittedTransform(Transform):
    """A transform of one layer after the other, each with the statistics of its inputs.

    Attributes:
        needs: what it cannot do without.
        fold: a layer, and what quantization makes of its weights, to the layer as it becomes.
    """

    needs: Needs
    fold: Callable[[Folding, Rounded], Folding]
    unties: bool = False

    @override
    def touches(self, model: ModelParts, unit: Unit) -> Mapping[str, int]:
        if not isinstance(unit, EndParts) and unit.router is not None:
            raise RecipeError(
                "smooth and awq move factors between the linears of one MLP, and this model has "
                "mixtures of experts: use a recipe without them, such as moe-w8a8 or moe-w4a16"
            )
        return dict.fromkeys(self.consults(model, unit), 1)

    @override
    def consults(self, model: ModelParts, unit: Unit) -> tuple[str, ...]:
        return () if isinstance(unit, EndParts) else unit.names

    @override
    def change(
        self, model: ModelParts, unit: Unit, floats: Floats, changes: Changes, kernels: Kernels
    ) -> Changes:
        """None: what is found is added when the layer has been calibrated."""
        return changes


SMOOTH = FittedTransform(Needs.SQUARES, lambda folding, rounded: smooth(folding))

AWQ = FittedTransform(Needs.HESSIAN, awq)
