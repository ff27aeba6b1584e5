"""What every transform promises; of one that needs data, see `fitted`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from qwen3_ascend.convert.transforms.changes import Changes, Floats
from qwen3_ascend.convert.transforms.parts import ModelParts, Unit
from qwen3_ascend.native import Kernels


class Transform(Protocol):
    """Makes equivalent weights, one unit of a model at a time.

    Attributes:
        unties: whether the head becomes another weight than the embedding, so that the two cannot
            be tied any more.
    """

    unties: bool

    def touches(self, model: ModelParts, unit: Unit) -> Mapping[str, int]:
        """Which weights of a unit it changes: by name, how many neighbouring outputs have to be
        known together (see `Change.block`). Known before any weight is.

        Raises:
            RecipeError: if it cannot change a model of this shape.
        """

    def consults(self, model: ModelParts, unit: Unit) -> tuple[str, ...]:
        """Names of the weights that it looks at to find the changes of a unit."""

    def change(
        self, model: ModelParts, unit: Unit, floats: Floats, changes: Changes, kernels: Kernels
    ) -> Changes:
        """The changes of a unit with its own after those of the transforms before it.

        Args:
            model: the unit's.
            unit: of which the changes are.
            floats: gives the weights that `consults` names.
            changes: of the transforms before.
            kernels: to compute with; all give the same bits.
        """
