"""cle: cross-layer equalization, without data (Nagel et al., arXiv 1906.04721).

Between two linears that meet in one channel, a factor can be moved from one to the other: from a
row of up to a column of down, and from a row of v to a column of o, which all query heads of a
group share. s = sqrt(rms(row) / rms(column)) makes the two alike; the row is divided by it, the
column multiplied. Rows and columns that are far larger than others cost the accuracy of a
quantized linear and of quantized activations, and most of them are undone so.

The factors are powers of two, so that no weight loses a bit by it, whatever it is stored as. They
are found of sums in a fixed order, square roots and exponents: the same on every machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from qwen3_ascend.convert.transforms.base import Transform
from qwen3_ascend.convert.transforms.changes import Changes, Floats
from qwen3_ascend.convert.transforms.parts import EndParts, LayerParts, ModelParts, Unit
from qwen3_ascend.native import Kernels

MOST_DOUBLINGS = 10
"""A factor is at most 2^10 from the others' mean: beyond that a channel is as good as dead."""


@dataclass(frozen=True)
class Cle(Transform):
    """See the module."""

    unties: bool = False

    @override
    def touches(self, model: ModelParts, unit: Unit) -> Mapping[str, int]:
        return dict.fromkeys(self.consults(model, unit), 1)

    @override
    def consults(self, model: ModelParts, unit: Unit) -> tuple[str, ...]:
        if isinstance(unit, EndParts):
            return ()
        pairs = [(unit.value, unit.output), *((mlp.up, mlp.down) for mlp in unit.mlps)]
        return tuple(name for pair in pairs for name in pair)

    @override
    def change(
        self, model: ModelParts, unit: Unit, floats: Floats, changes: Changes, kernels: Kernels
    ) -> Changes:
        if isinstance(unit, EndParts):
            return changes
        equalizer = _Equalizer(floats, kernels)
        for mlp in unit.mlps:
            changes = equalizer.pair(changes, mlp.up, mlp.down)
        return equalizer.values(changes, model, unit)


@dataclass(frozen=True)
class _Equalizer:
    """Moves factors between linears."""

    floats: Floats
    kernels: Kernels

    def pair(self, changes: Changes, writer: str, reader: str) -> Changes:
        """Between each output of one linear and the input that it becomes."""
        rows = self._mean_squares(changes, writer, 0)
        return _moved(
            changes, writer, reader, _factors(rows, self._mean_squares(changes, reader, 1))
        )

    def values(self, changes: Changes, model: ModelParts, layer: LayerParts) -> Changes:
        """Between the values and the inputs of the output projection, a group for each of them."""
        rows = self._mean_squares(changes, layer.value, 0)
        columns = self._mean_squares(changes, layer.output, 1)
        groups = columns.view(model.num_kv_heads, -1, model.head_dim)
        total = groups[:, 0]
        for head in range(1, groups.shape[1]):  # in this order on every machine
            total = total + groups[:, head]
        factors = _factors(rows, total.flatten() / groups.shape[1])
        return _moved(changes, layer.value, layer.output, factors, shared_by(factors, model))

    def _mean_squares(self, changes: Changes, name: str, axis: int) -> Tensor:
        """Of each row (axis 0) or column (axis 1), float64."""
        weight = changes.weight(name, self.floats, self.kernels)
        sums = torch.empty(weight.shape[axis], dtype=torch.float64)
        self.kernels.square_sums(weight, axis, sums)
        return sums / weight.shape[1 - axis]


def shared_by(factors: Tensor, model: ModelParts) -> Tensor:
    """Factors of the values [kv heads * head_dim] as those of the attention's result, which has
    them once for each query head of a group."""
    groups = factors.view(model.num_kv_heads, 1, model.head_dim)
    return groups.expand(-1, model.num_heads // model.num_kv_heads, -1).flatten()


def _moved(
    changes: Changes, writer: str, reader: str, factors: Tensor, spread: Tensor | None = None
) -> Changes:
    inputs = factors if spread is None else spread
    return changes.scaled("outputs", 1.0 / factors, writer).scaled("inputs", inputs, reader)


def _factors(rows: Tensor, columns: Tensor) -> Tensor:
    """sqrt(rms(row) / rms(column)) of mean squares, rounded to a power of two, float32; 1 where one
    of them is zero or not finite."""
    ratio = (rows / columns).sqrt().sqrt()
    is_usable = torch.isfinite(ratio) & (ratio > 0)
    mantissa, exponent = torch.frexp(torch.where(is_usable, ratio, torch.ones_like(ratio)))
    doublings = exponent.long() - (mantissa < 0.5**0.5).long()  # the nearest, by its logarithm
    mean = int(doublings.sum()) // max(1, len(doublings))
    kept = (doublings - mean).clamp(-MOST_DOUBLINGS, MOST_DOUBLINGS)
    kept = torch.where(is_usable, kept, torch.zeros_like(kept))
    return torch.ldexp(torch.ones(len(kept)), kept.int())
