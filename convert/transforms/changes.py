"""What becomes of the weights of a model, so that it stays the same function.

A linear y = W x has outputs and inputs. If what it reads becomes x', and what reads it wants y',
its weight [N, K] has to follow: factors or a rotation of the inputs, of the outputs, or of both.

    scale outputs    W' = diag(f) W     the reader of y' takes y'/f
    scale inputs     W' = W diag(f)     the writer of x' gives x/f
    rotate outputs   W' = R W           the reader of y' takes R'y'
    rotate inputs    W' = W R'          the writer of x' gives R x

A bias is one more column, whose outputs alone are changed. The gain of a norm is replaced: what it
was goes into the linears that read the norm. All of it is float32; a weight is rounded once, when
its codes are chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qwen3_ascend import native
from qwen3_ascend.checkpoint.layout import Cut
from qwen3_ascend.convert.transforms.hadamard import Rotation
from qwen3_ascend.native import Kernels


@dataclass(frozen=True, eq=False)
class Scale:
    """Multiplies outputs or inputs by factors.

    Attributes:
        axis: which of the two.
        factors: float32 [N] or [K].
    """

    axis: Cut
    factors: Tensor


@dataclass(frozen=True)
class Rotate:
    """Rotates each block of neighbouring outputs or inputs."""

    axis: Cut
    rotation: Rotation


@dataclass(frozen=True, eq=False)
class Replace:
    """The gain of a norm, a matrix [1, K], becomes another one: float32 [K], exact in bfloat16."""

    gain: Tensor


Step = Scale | Rotate | Replace


@dataclass(frozen=True, eq=False)
class Change:
    """The steps from a source weight to the one that is stored, in order."""

    steps: tuple[Step, ...] = ()

    def then(self, *steps: Step) -> Change:
        """These steps after its own."""
        return Change((*self.steps, *steps))

    @property
    def block(self) -> int:
        """How many neighbouring outputs have to be known together, beginning at a multiple."""
        sizes = [
            step.rotation.size
            for step in self.steps
            if isinstance(step, Rotate) and step.axis == "outputs"
        ]
        return math.lcm(*sizes)

    def weight(self, weight: Tensor, start: int = 0, kernels: Kernels | None = None) -> Tensor:
        """Some outputs of a weight, or all of them.

        Args:
            weight: bfloat16, float16 or float32 [n, K]; n and `start` are multiples of `block`.
            start: the output that is the first one here.
            kernels: to rotate with; all give the same bits. Default: the best that there are.

        Returns:
            float32 [n, K], contiguous, of its own memory.
        """
        changed = weight.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        waiting: Tensor | None = None  # factors of inputs that the next rotation can multiply with
        for step in self.steps:
            if isinstance(step, Scale) and step.axis == "inputs":
                waiting = step.factors if waiting is None else waiting * step.factors
            elif isinstance(step, Scale):
                changed.mul_(step.factors[start : start + len(changed), None])
            elif isinstance(step, Replace):
                changed.copy_(step.gain)
            elif step.axis == "outputs":
                step.rotation.of_outputs(changed, kernels or native.best())
            else:
                step.rotation.of_inputs(changed, kernels or native.best(), waiting)
                waiting = None
        return changed if waiting is None else changed.mul_(waiting)

    def bias(self, bias: Tensor, kernels: Kernels | None = None) -> Tensor:
        """The bias [N] of a linear, float32: what its outputs become."""
        outputs = tuple(s for s in self.steps if not isinstance(s, Replace) and s.axis == "outputs")
        return Change(outputs).weight(bias[:, None], kernels=kernels)[:, 0]


UNCHANGED = Change()

FindChanges = Callable[[], Sequence[Change]]
"""Finds the changes of the parts of a linear, which may have to look at other weights."""

Floats = Callable[[str], Tensor]
"""The weight of a linear, norm or embedding as the source has it, by name: [N, K], or [K]."""


@dataclass(frozen=True)
class Changes:
    """The changes of a model, or of a part of it.

    Attributes:
        of: by the name of a linear, norm or embedding, without ".weight". What is not there stays
            as it is.
    """

    of: Mapping[str, Change] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Change:
        return self.of.get(name, UNCHANGED)

    def weight(self, name: str, floats: Floats, kernels: Kernels) -> Tensor:
        """A whole weight as it has become: [N, K], or [1, K] of a norm; a view if unchanged."""
        found = floats(name)
        matrix = found.view(-1, found.shape[-1])
        return self[name].weight(matrix, kernels=kernels) if self[name].steps else matrix

    def then(self, name: str, *steps: Step) -> Changes:
        """With further steps for one weight."""
        return Changes({**self.of, name: self[name].then(*steps)})

    def scaled(self, axis: Cut, factors: Tensor, *names: str) -> Changes:
        """With outputs or inputs of some linears multiplied by factors."""
        changes = self
        for name in names:
            changes = changes.then(name, Scale(axis, factors))
        return changes

    def rotated(self, axis: Cut, rotation: Rotation, *names: str) -> Changes:
        """With outputs or inputs of some linears rotated."""
        changes = self
        for name in names:
            changes = changes.then(name, Rotate(axis, rotation))
        return changes

    def regained(self, norm: str, gain: Gain, *readers: str) -> Changes:
        """With another gain of a norm, and every linear that reads it making up for it."""
        return self.then(norm, Replace(gain.stored)).scaled("inputs", gain.factors, *readers)


@dataclass(frozen=True, eq=False)
class Gain:
    """Another gain of a norm.

    Attributes:
        stored: float32 [K], exact in bfloat16.
        factors: float32 [K], by which the inputs of its readers have to be multiplied.
    """

    stored: Tensor
    factors: Tensor

    @classmethod
    def replacing(cls, old: Tensor, wanted: Tensor) -> Gain:
        """What comes of a gain, float32 [K], that is to become another one, which bfloat16 rounds.
        One that would become zero stays as it is: nothing could make up for it."""
        rounded = wanted.to(torch.bfloat16).float()
        stored = torch.where(rounded == 0, old, rounded)
        return cls(stored, torch.where(stored == 0, torch.ones_like(old), old / stored))
