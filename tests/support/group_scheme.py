"""A made-up scheme for tests: what a scheme with parameters and group scales may ask of the house.

4-bit codes in groups along the inputs, two to a byte, with a float32 scale for each group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from qwen3_ascend.checkpoint.layout import Cut, Layout, Place
from qwen3_ascend.checkpoint.schemes import Codes, Input, Scheme
from qwen3_ascend.files.safetensors import Form

NZ = Layout("nz", "KN", 32, per_word=2)
LAYOUTS = (NZ, Layout("nz", "NK", 32, per_word=2), Layout("nd", per_word=2))


@dataclass(frozen=True)
class GroupInt4(Scheme):
    """weight: int4, two to an int8 word; scale: float32 [*batch, K / group, N]."""

    name: ClassVar[str] = "group-int4"
    input: ClassVar[Input] = Input.FLOAT

    group: int = 32

    @override
    def forms(self, shape: Sequence[int], layout: Layout) -> dict[str, Form]:
        *batch, outputs, inputs = shape
        return {
            "weight": Form(torch.int8, layout.storage_shape(shape)),
            "scale": Form(torch.float32, (*batch, -(-inputs // self.group), outputs)),
        }

    @override
    def places(self, layout: Layout) -> dict[str, dict[Cut, Place]]:
        return {
            "weight": {"outputs": layout.place("outputs"), "inputs": layout.place("inputs")},
            "scale": {"outputs": Place(-1, 1), "inputs": Place(-2, self.group)},
        }

    @override
    def choose(self, weight: Tensor) -> Codes:
        inputs = weight.shape[-1]
        padded = torch.nn.functional.pad(weight.float(), (0, -inputs % self.group))
        groups = padded.view(*weight.shape[:-1], -1, self.group)
        scale = groups.abs().amax(-1) / 7
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        codes = torch.round(groups / scale[..., None]).to(torch.int8).flatten(-2)
        return {"weight": codes[..., :inputs], "scale": scale.transpose(-2, -1).contiguous()}

    @override
    def decode(self, codes: Codes) -> Tensor:
        inputs = codes["weight"].shape[-1]
        scale = codes["scale"].transpose(-2, -1).repeat_interleave(self.group, -1)[..., :inputs]
        return codes["weight"].float() * scale

    @override
    def product(self, codes: Codes, x: Tensor) -> Tensor:
        return x.float() @ self.decode(codes).t()
