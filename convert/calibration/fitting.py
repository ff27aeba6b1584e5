"""What transforms that look at activations make of one layer after the other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from qwen3_ascend.checkpoint.schemes.grid import Grid, IntegerScheme
from qwen3_ascend.convert.calibration.factors import KeptFactors, factors_bytes
from qwen3_ascend.convert.plan import Plan
from qwen3_ascend.convert.quantizers.mse import Mse
from qwen3_ascend.convert.statistics import InputStatistics, Seen
from qwen3_ascend.convert.transforms import FittedTransform
from qwen3_ascend.convert.transforms.awq import Rounded
from qwen3_ascend.convert.transforms.changes import Change, Changes, Floats, Scale
from qwen3_ascend.convert.transforms.folding import Folding, LayerInputs
from qwen3_ascend.convert.transforms.parts import LayerParts, model_parts
from qwen3_ascend.convert.transforms.whole import ModelChanges
from qwen3_ascend.native import Kernels


class Fitting:
    """The fitted transforms of a plan; without any, nothing changes."""

    def __init__(self, plan: Plan, changes: ModelChanges, floats: Floats, staging: Path) -> None:
        """Args:
        plan: names the transforms.
        changes: of the transforms that need no data; what is found is added to them.
        floats: gives the weights of the source.
        staging: where what is found is kept.
        """
        self._transforms = [t for t in plan.transforms if isinstance(t, FittedTransform)]
        self._parts = {i.name: i.parts for i in plan.items}
        self._grids = {
            part: item.scheme.grid
            for item in plan.items
            if isinstance(item.scheme, IntegerScheme)
            for part in item.parts
        }
        self._model, self._changes, self._floats = model_parts(plan.config), changes, floats
        self._kept = KeptFactors(staging)

    def is_known(self, number: int) -> bool:
        """Whether nothing is left to be found for a layer, so that weights of it that an earlier
        run has written can be believed."""
        return not self._transforms or self._kept.find(number) is not None

    def fit(self, number: int, statistics: Mapping[str, Seen]) -> dict[str, Seen]:
        """Finds, or takes up, what becomes of a layer.

        Args:
            number: of the layer, from 0.
            statistics: of the inputs of its linears, by name.

        Returns:
            Those of the inputs as they are then.
        """
        if not self._transforms:
            return dict(statistics)
        inputs = {name: _only(seen) for name, seen in statistics.items()}
        found = self._kept.find(number)
        if found is None:
            found = self._found(self._model.layers[number], inputs)
            self._kept.keep(number, found)
        self._changes.add(found)
        return {name: (known,) for name, known in self._divided(inputs, found).items()}

    def whole(self) -> bytes | None:
        """What was found for all layers, as a safetensors file; None if there was nothing to."""
        if not self._transforms:
            return None
        changes: dict[str, Change] = {}
        for number in range(len(self._model.layers)):
            found = self._kept.find(number)
            assert found is not None, "every layer was fitted"
            changes |= found.of
        return factors_bytes(Changes(changes))

    def _found(self, layer: LayerParts, statistics: Mapping[str, InputStatistics]) -> Changes:
        before, kernels = self._changes.unit(layer, self._floats), self._changes.kernels
        (mlp,) = layer.mlps
        fed = {part: known for name, known in statistics.items() for part in self._parts[name]}
        inputs = LayerInputs(fed[layer.query], fed[layer.output], fed[mlp.gate], fed[mlp.down])
        folding = Folding(self._model, layer, self._floats, kernels, before, inputs)
        for transform in self._transforms:
            folding = transform.fold(folding, self._rounded(layer))
        return _after(before, folding.changes)

    def _rounded(self, layer: LayerParts) -> Rounded:
        """What quantization makes of the weights of a layer: on the coarsest of its grids."""
        grids = [g for part in layer.names if (g := self._grids.get(part)) is not None]
        if not grids:
            return lambda weight, squares: weight.bfloat16().float()
        return on_grid(min(grids, key=lambda grid: grid.bits), self._changes.kernels)

    def _divided(
        self, statistics: Mapping[str, InputStatistics], found: Changes
    ) -> dict[str, InputStatistics]:
        """A weight whose inputs are multiplied is fed inputs that are divided; the linears that are
        fused to one are fed the same."""
        factors = {name: _of_inputs(found[self._parts[name][0]]) for name in statistics}
        return {
            name: known if (by := factors[name]) is None else known.divided(by)
            for name, known in statistics.items()
        }


def _only(seen: Seen) -> InputStatistics:
    """Of a linear by itself: the plan refuses these transforms for mixtures."""
    (known,) = seen
    assert known is not None, "every token reaches a linear by itself"
    return known


def on_grid(grid: Grid, kernels: Kernels) -> Rounded:
    """What the integers of a grid stand for, under the scales of least error."""

    def rounded(weight: Tensor, squares: Tensor) -> Tensor:
        known = InputStatistics(1, squares, squares, squares, squares)
        chosen = Mse().prepare(grid, known, kernels)(weight)
        return grid.decode(chosen.integers, chosen.scales)

    return rounded


def _after(before: Changes, changes: Changes) -> Changes:
    """The steps that came to those before."""
    return Changes({
        name: Change(steps)
        for name, change in changes.of.items()
        if (steps := change.steps[len(before[name].steps) :])
    })  # fmt: skip


def _of_inputs(change: Change) -> Tensor | None:
    """By what a change multiplies the inputs of a weight; None if it does not."""
    factors = [s.factors for s in change.steps if isinstance(s, Scale) and s.axis == "inputs"]
    return torch.stack(factors).prod(0) if factors else None
