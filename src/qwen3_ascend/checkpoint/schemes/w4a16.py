"""w4a16: int4 weights under a scale for each group of neighbouring inputs, activations as they are.

    y = x @ (weight * scale of its group)'

A scale may be negative: the weight of the largest magnitude in a group becomes -8, whatever its
sign, so that all sixteen integers are used. Scales are bfloat16 before the integers are chosen.

With zero points a group also has an offset, a whole number from -8 to 8, which is added to its
integers: minus the integer that stands for zero.

    y = x @ ((weight + offset of its group) * scale of its group)'

That is the form of models that other tools have quantized asymmetrically, and there to take them.
Of floats, a group's range with zero in it is divided into fifteen steps:

    scale  = bf16((largest - least) / 15)
    offset = clip(round(least / scale) + 8, -7, 8)
    weight = clip(round(w / scale) - offset, -8, 7)

The tensors are what npu_weight_quant_batchmatmul reads (op-plugin's documentation of it and of
npu_convert_weight_to_int4pack): [K, N] with eight outputs in an int32, the first in the lowest
bits, and scales and offsets [K / group, N].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from qwen3_ascend.checkpoint.layout import Cut, Layout, Place, nz_columns
from qwen3_ascend.checkpoint.schemes.base import Codes, Input
from qwen3_ascend.checkpoint.schemes.grid import Grid, IntegerScheme, stored_scale
from qwen3_ascend.files.safetensors import Form

NZ = Layout("nz", "KN", nz_columns(torch.int32.itemsize), per_word=8)
"""FRACTAL_NZ of [K, N] in strips of 64 outputs."""

ROWS = Layout("nd", "KN", per_word=8)
"""[K, N] row by row, for what the operator does not take in FRACTAL_NZ."""


GROUPS = (32, 64, 128)
"""The operator takes any multiple of 32; these are the ones that are used."""


@dataclass(frozen=True)
class W4A16(IntegerScheme):
    """weight: int4, eight to an int32; scale: bfloat16 [*batch, ceil(K / group), N]; with zero
    points also offset: the same, whole numbers, which bfloat16 has exactly.

    Attributes:
        group: inputs that share a scale, one of GROUPS.
        zero_points: whether they share an offset as well.

    Raises:
        ValueError: for another group.
    """

    name: ClassVar[str] = "w4a16"
    input: ClassVar[Input] = Input.FLOAT

    group: int = 128
    zero_points: bool = False

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise ValueError(f"a group has 32, 64 or 128 inputs, not {self.group}")

    @override
    def forms(self, shape: Sequence[int], layout: Layout) -> dict[str, Form]:
        *batch, outputs, inputs = shape
        of_groups = Form(torch.bfloat16, (*batch, self.grid.groups(inputs), outputs))
        weight = Form(layout.code_type, layout.storage_shape(shape))
        return {"weight": weight, **dict.fromkeys(self._of_groups, of_groups)}

    @override
    def places(self, layout: Layout) -> dict[str, dict[Cut, Place]]:
        of_groups: dict[Cut, Place] = {"outputs": Place(-1, 1), "inputs": Place(-2, self.group)}
        return {
            "weight": {"outputs": layout.place("outputs"), "inputs": layout.place("inputs")},
            **dict.fromkeys(self._of_groups, of_groups),
        }

    @property
    def _of_groups(self) -> tuple[str, ...]:
        """Suffixes of what inputs of a group share."""
        return ("scale", "offset") if self.zero_points else ("scale",)

    @property
    @override
    def grid(self) -> Grid:
        """Without offsets: zero points are found by `choose` alone, or come with a source."""
        return Grid(4, self.group, signed_scale=True)

    @override
    def codes(self, integers: Tensor, scales: Tensor) -> Codes:
        found = {"weight": integers, "scale": _by_group(scales)}
        return {**found, "offset": torch.zeros_like(found["scale"])} if self.zero_points else found

    def offset_codes(self, integers: Tensor, scales: Tensor, offsets: Tensor) -> Codes:
        """The codes of integers under offsets, whole numbers of the shape of scales; see `codes`.
        The scheme has zero points."""
        return {**self.codes(integers, scales), "offset": _by_group(offsets)}

    @override
    def choose(self, weight: Tensor) -> Codes:
        if not self.zero_points:
            return super().choose(weight)
        grid, inputs = self.grid, weight.shape[-1]
        scales, offsets = _scales_and_offsets(grid, weight)
        steps = torch.round(weight.float() / grid.spread(scales, inputs))
        integers = steps.sub_(grid.spread(offsets, inputs)).clamp_(grid.least, grid.most)
        return self.offset_codes(integers.to(torch.int8), scales, offsets)

    @override
    def decode(self, codes: Codes) -> Tensor:
        integers = codes["weight"].float()
        if self.zero_points:
            integers += self.grid.spread(_by_output(codes["offset"]), integers.shape[-1])
        return self.grid.decode(integers, _by_output(codes["scale"]))

    @override
    def product(self, codes: Codes, x: Tensor) -> Tensor:
        return x.float() @ self.decode(codes).t()


def _by_group(shared: Tensor) -> Tensor:
    """Scales or offsets [*batch, N, G] as they are stored."""
    return shared.transpose(-2, -1).bfloat16().contiguous()


def _by_output(stored: Tensor) -> Tensor:
    """The inverse: float32."""
    return stored.transpose(-2, -1).float()


def _scales_and_offsets(grid: Grid, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Those whose integers span the range of each group of a weight [*batch, N, K], float32
    [*batch, N, G]; see the module."""
    groups = grid.grouped(weight.float())
    least, largest = groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)
    steps = grid.most - grid.least  # each bound is divided, as their difference may overflow
    scales = stored_scale(largest / steps - least / steps)
    offsets = torch.round(least / scales).sub_(grid.least).clamp_(-grid.most, -grid.least)
    return scales, offsets
