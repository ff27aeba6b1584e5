"""The changes of a whole model: found unit by unit, when they are first asked for."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from qwen3_ascend import native
from qwen3_ascend.convert.transforms.base import Transform
from qwen3_ascend.convert.transforms.changes import Change, Changes, Floats, Step
from qwen3_ascend.convert.transforms.parts import ModelParts, Unit
from qwen3_ascend.native import Kernels


@dataclass(frozen=True)
class Touched:
    """What is known of the change of a weight from headers.

    Attributes:
        block: how many neighbouring outputs have to be known together.
        consults: names of the weights that decide the change.
    """

    block: int
    consults: tuple[str, ...]


def touched(model: ModelParts, transforms: Sequence[Transform]) -> dict[str, Touched]:
    """The weights that transforms change, by name.

    Raises:
        RecipeError: if a transform cannot change a model of this shape.
    """
    found: dict[str, Touched] = {}
    for unit in model.units:
        consults = tuple(dict.fromkeys(n for t in transforms for n in t.consults(model, unit)))
        for transform in transforms:
            for name, block in transform.touches(model, unit).items():
                before = found[name].block if name in found else 1
                # One is a multiple of the other: both are of the same axis.
                found[name] = Touched(max(before, block), consults)
    return found


def unit_changes(
    model: ModelParts,
    unit: Unit,
    transforms: Sequence[Transform],
    floats: Floats,
    kernels: Kernels | None = None,
) -> Changes:
    """What transforms, in their order, make of one unit of a model."""
    changes = Changes()
    for transform in transforms:
        changes = transform.change(model, unit, floats, changes, kernels or native.best())
    return changes


class ModelChanges:
    """Finds the changes of each unit once; threads that want the same one wait for it.

    What is kept are factors, one for each channel: some megabytes of the largest model.

    Attributes:
        kernels: that it computes with.
        touched: what is known before any weight is.
    """

    def __init__(
        self, model: ModelParts, transforms: Sequence[Transform], kernels: Kernels
    ) -> None:
        self.kernels = kernels
        self.touched = touched(model, transforms)
        self._model, self._transforms = model, transforms
        self._units = {name: unit for unit in model.units for name in unit.names}
        self._found: dict[Unit, Changes] = {}
        self._fitted: dict[str, Change] = {}
        self._locks = {unit: threading.Lock() for unit in model.units}

    def of(self, names: Sequence[str], floats: Floats) -> list[Change]:
        """The changes of some weights.

        Args:
            names: of one unit.
            floats: gives what the unit consults.
        """
        return [
            self._changes(self._units[name], floats)[name].then(*self._more(name)) for name in names
        ]

    def unit(self, unit: Unit, floats: Floats) -> Changes:
        """The changes of all weights of a unit."""
        return Changes(dict(zip(unit.names, self.of(unit.names, floats), strict=True)))

    def add(self, fitted: Changes) -> None:
        """Adds what calibration has found to the changes of some weights."""
        self._fitted |= fitted.of

    def _more(self, name: str) -> tuple[Step, ...]:
        change = self._fitted.get(name)
        return () if change is None else change.steps

    def _changes(self, unit: Unit, floats: Floats) -> Changes:
        with self._locks[unit]:
            if unit not in self._found:
                self._found[unit] = unit_changes(
                    self._model, unit, self._transforms, floats, self.kernels
                )
            return self._found[unit]


def state_changes(
    state: Mapping[str, Tensor], model: ModelParts, transforms: Sequence[Transform]
) -> Changes:
    """The changes of a model that fits into memory.

    Args:
        state: tensors by the names of transformers; of a tied head it need hold none.
        model: its parts.
        transforms: in their order.
    """
    found: dict[str, Change] = {}
    for unit in model.units:
        found |= unit_changes(model, unit, transforms, lambda name: state[f"{name}.weight"]).of
    return Changes(found)


def changed_state(
    state: Mapping[str, Tensor], model: ModelParts, changes: Changes
) -> dict[str, Tensor]:
    """A model that fits into memory after changes: float32, the same function.

    Args:
        state: tensors by the names of transformers.
        model: its parts. If its head changes and the state holds none, since it is tied to the
            embedding, the result has one.
        changes: of its weights.
    """
    whole = dict(state)
    if changes[model.ends.head].steps:
        embedding = state[f"{model.ends.embedding}.weight"]
        whole.setdefault(f"{model.ends.head}.weight", embedding)
    return {name: _changed(name, tensor, changes) for name, tensor in whole.items()}


def _changed(name: str, tensor: Tensor, changes: Changes) -> Tensor:
    linear, _, suffix = name.rpartition(".")
    if suffix == "bias":
        return changes[linear].bias(tensor)
    return changes[linear].weight(tensor.view(-1, tensor.shape[-1])).view(tensor.shape)
