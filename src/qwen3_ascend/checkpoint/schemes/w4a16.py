"""w4a16: int4 weights under a scale for each group of neighbouring inputs, activations as they are.

    y = x @ (weight * scale of its group)'

A scale may be negative: the weight of the largest magnitude in a group becomes -8, whatever its
sign, so that all sixteen integers are used. Scales are bfloat16 before the integers are chosen.

The tensors are what npu_weight_quant_batchmatmul reads (op-plugin's documentation of it and of
npu_convert_weight_to_int4pack): [K, N] with eight outputs in an int32, the first in the lowest
bits, and the scales [K / group, N].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from qwen3_ascend.checkpoint.layout import Cut, Layout, Place, nz_columns
from qwen3_ascend.checkpoint.schemes.base import Codes, Input
from qwen3_ascend.checkpoint.schemes.grid import Grid, IntegerScheme
from qwen3_ascend.files.safetensors import Form

NZ = Layout("nz", "KN", nz_columns(torch.int32.itemsize), per_word=8)
"""FRACTAL_NZ of [K, N] in strips of 64 outputs."""

ROWS = Layout("nd", "KN", per_word=8)
"""[K, N] row by row, for what the operator does not take in FRACTAL_NZ."""


GROUPS = (32, 64, 128)
"""The operator takes any multiple of 32; these are the ones that are used."""


@dataclass(frozen=True)
class W4A16(IntegerScheme):
    """weight: int4, eight to an int32; scale: bfloat16 [*batch, ceil(K / group), N].

    Attributes:
        group: inputs that share a scale, one of GROUPS.

    Raises:
        ValueError: for another group.
    """

    name: ClassVar[str] = "w4a16"
    input: ClassVar[Input] = Input.FLOAT

    group: int = 128

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise ValueError(f"a group has 32, 64 or 128 inputs, not {self.group}")

    @override
    def forms(self, shape: Sequence[int], layout: Layout) -> dict[str, Form]:
        *batch, outputs, inputs = shape
        return {
            "weight": Form(layout.code_type, layout.storage_shape(shape)),
            "scale": Form(torch.bfloat16, (*batch, self.grid.groups(inputs), outputs)),
        }

    @override
    def places(self, layout: Layout) -> dict[str, dict[Cut, Place]]:
        return {
            "weight": {"outputs": layout.place("outputs"), "inputs": layout.place("inputs")},
            "scale": {"outputs": Place(-1, 1), "inputs": Place(-2, self.group)},
        }

    @property
    @override
    def grid(self) -> Grid:
        return Grid(4, self.group, signed_scale=True)

    @override
    def codes(self, integers: Tensor, scales: Tensor) -> Codes:
        by_group = scales.transpose(-2, -1).to(torch.bfloat16)
        return {"weight": integers, "scale": by_group.contiguous()}

    @override
    def pack(self, codes: Codes, layout: Layout) -> dict[str, Tensor]:
        return {"weight": layout.pack(codes["weight"]), "scale": codes["scale"]}

    @override
    def unpack(self, tensors: Mapping[str, Tensor], shape: Sequence[int], layout: Layout) -> Codes:
        return {"weight": layout.unpack(tensors["weight"], shape), "scale": tensors["scale"]}

    @override
    def decode(self, codes: Codes) -> Tensor:
        scales = codes["scale"].transpose(-2, -1).float()
        return self.grid.decode(codes["weight"], scales)

    @override
    def product(self, codes: Codes, x: Tensor) -> Tensor:
        return x.float() @ self.decode(codes).t()
