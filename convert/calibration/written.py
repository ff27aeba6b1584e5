"""The weights that a conversion has written so far, read back from its staging folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from qwen3_ascend.checkpoint.linear import Linear
from qwen3_ascend.convert.plan import Item, Plan
from qwen3_ascend.files.safetensors import MappedFile


class WrittenWeights:
    """A WeightSource of what is written: the next layer is calibrated with what it gives.

    Attributes:
        config: of the model as it is stored.
    """

    def __init__(self, plan: Plan, files: Mapping[str, str], staging: Path) -> None:
        """Args:
        plan: which weights there will be.
        files: the weight file of each stored tensor.
        staging: the folder of the weight files.
        """
        self.config = plan.config
        self._items: dict[str, Item] = {item.name: item for item in plan.items}
        self._files, self._staging = files, staging

    def tensor(self, name: str) -> Tensor:
        """An unquantized tensor, as a view of its mapped file."""
        # Mapped anew each time: the file was written to since, and it is not kept in memory.
        return MappedFile(self._staging / self._files[name]).tensor(name)

    def linear(self, name: str) -> Linear:
        """A stored linear; its tensors are views of the mapped file."""
        item = self._items[name]
        tensors = {suffix: self.tensor(item.stored_name(suffix)) for suffix in item.stored}
        return Linear(item.scheme, item.spec.shape, item.layout, tensors)
