"""Integer weights: what all schemes share whose codes are integers under a scale.

Which integers and which scales stand for a weight is a question of its own, to which there are
several answers (the nearest, those with the least error, those that make up for each other). They
all speak of a `Grid` and know no scheme; a scheme makes its stored tensors of what they have found.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from qwen3_ascend.checkpoint.schemes.base import Codes, Scheme


@dataclass(frozen=True)
class Grid:
    """The integers that a weight may become, and what shares a scale.

    Attributes:
        bits: of an integer.
        group: neighbouring inputs of an output that share a scale; None if all of them do. The last
            group of an output may be shorter.
        signed_scale: whether a scale may be negative, so that the weight of the largest magnitude
            in a group becomes the least integer, -2^(bits - 1), whatever its sign. If not, the
            integers are symmetric.
    """

    bits: int
    group: int | None = None
    signed_scale: bool = False

    @property
    def most(self) -> int:
        """The largest integer."""
        return (1 << self.bits - 1) - 1

    @property
    def least(self) -> int:
        """The smallest integer."""
        return -self.most - int(self.signed_scale)

    def groups(self, inputs: int) -> int:
        """How many scales an output has."""
        return 1 if self.group is None else -(-inputs // self.group)

    def width(self, inputs: int) -> int:
        """Inputs of a group, but for the last one."""
        return inputs if self.group is None else min(self.group, inputs)

    def grouped(self, weight: Tensor) -> Tensor:
        """[..., N, K] as [..., N, G, inputs of a group]; missing inputs are zero."""
        inputs = weight.shape[-1]
        width, groups = self.width(inputs), self.groups(inputs)
        padded = torch.nn.functional.pad(weight, (0, width * groups - inputs))
        return padded.view(*weight.shape[:-1], groups, width)

    def spread(self, scales: Tensor, inputs: int) -> Tensor:
        """Scales [..., N, G] as the scale of each weight: a view or copy [..., N, K]."""
        if scales.shape[-1] == 1:
            return scales.expand(*scales.shape[:-1], inputs)
        return scales.repeat_interleave(self.width(inputs), -1)[..., :inputs]

    def widest_scales(self, weight: Tensor) -> Tensor:
        """The scales under which no weight is clipped: float32 [..., N, G] of finite [..., N, K].

        Each is exactly representable in bfloat16, because Ascend's stacks read scales as that; a
        group of zeros (or one so small that its scale vanishes) has the scale 1.
        """
        groups = self.grouped(weight.float())
        if not self.signed_scale:
            return stored_scale(groups.abs().amax(-1) / self.most)
        largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
        return stored_scale(largest / self.least)

    def nearest(self, weight: Tensor, scales: Tensor) -> Tensor:
        """The nearest integers, int8 [..., N, K], to [..., N, K] under scales [..., N, G]: half to
        even, in float32."""
        exact = weight.float() / self.spread(scales, weight.shape[-1])
        return torch.round(exact).clamp_(self.least, self.most).to(torch.int8)

    def decode(self, integers: Tensor, scales: Tensor) -> Tensor:
        """What integers [..., N, K] under scales [..., N, G] stand for: float32 [..., N, K]."""
        return integers * self.spread(scales, integers.shape[-1])


def stored_scale(scale: Tensor) -> Tensor:
    """Scales as they are stored: rounded to bfloat16, 1 where nothing is left; float32."""
    rounded = scale.bfloat16().float()
    return torch.where(rounded == 0, torch.ones_like(rounded), rounded)


class IntegerScheme(Scheme):
    """A scheme whose codes are the integers of a grid."""

    @property
    @abstractmethod
    def grid(self) -> Grid:
        """The integers that its weights may become."""

    @abstractmethod
    def codes(self, integers: Tensor, scales: Tensor) -> Codes:
        """The codes of integers int8 [*batch, N, K] and scales float32 [*batch, N, G], each scale
        exactly representable in bfloat16."""

    @override
    def choose(self, weight: Tensor) -> Codes:
        scales = self.grid.widest_scales(weight)
        return self.codes(self.grid.nearest(weight, scales), scales)
