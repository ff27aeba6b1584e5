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
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from qwen3_ascend import native
from qwen3_ascend.checkpoint.layout import Cut
from qwen3_ascend.convert.transforms.hadamard import Rotation
from qwen3_ascend.native import Kernels, Rows, RowStep


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

    def prepared(self, inputs: int) -> Prepared:
        """What is to be done to a weight [N, K], K `inputs`, in as few passes as can be."""
        found = _Passes(inputs)
        for step in self.steps:
            found.add(step)
        return found.prepared()

    def weight(self, weight: Tensor, start: int = 0, kernels: Kernels | None = None) -> Tensor:
        """Some outputs of a weight, or all of them.

        Args:
            weight: bfloat16, float16 or float32 [n, K]; n and `start` are multiples of `block`.
            start: the output that is the first one here.
            kernels: to compute with; all give the same bits. Default: the best that there are.

        Returns:
            float32 [n, K], contiguous, of its own memory.
        """
        kernels, prepared = kernels or native.best(), self.prepared(weight.shape[1])
        rows = prepared.rows(weight, start, kernels)
        out = rows.source if prepared.mixed else _empty(weight)
        kernels.change_rows(rows.source, rows.steps, out)
        return out

    def bias(self, bias: Tensor, kernels: Kernels | None = None) -> Tensor:
        """The bias [N] of a linear, float32: what its outputs become."""
        outputs = tuple(s for s in self.steps if not isinstance(s, Replace) and s.axis == "outputs")
        return Change(outputs).weight(bias[:, None], kernels=kernels)[:, 0]


UNCHANGED = Change()


@dataclass(frozen=True, eq=False)
class Prepared:
    """The passes of a change over a weight [N, K]: what is done to each row by itself goes into
    the pass that comes after it.

    Attributes:
        gain: what stands in the place of the source, if the gain of a norm is replaced.
        mixed: rotations of outputs, each with the steps of rows before it.
        steps: of rows, that are left for whoever reads them.
    """

    gain: Tensor | None
    mixed: tuple[tuple[tuple[RowStep, ...], Rotation], ...]
    steps: tuple[RowStep, ...]

    @property
    def block(self) -> int:
        """As `Change.block`."""
        return math.lcm(*(rotation.size for _, rotation in self.mixed))

    def rows(self, weight: Tensor, start: int, kernels: Kernels) -> Rows:
        """Some outputs of a weight, or all; see `Change.weight`. Views of the weight if no outputs
        are mixed, else float32 of its own memory."""
        if self.gain is not None:
            weight = self.gain.expand(weight.shape)
        outputs = slice(start, start + len(weight))
        out: Tensor | None = None
        for steps, rotation in self.mixed:
            out = _empty(weight) if out is None else out
            if steps:
                kernels.change_rows(weight, [step.of(outputs) for step in steps], out)
                weight = out
            rotation.of_outputs(weight, kernels, out)
            weight = out
        return Rows(weight, tuple(step.of(outputs) for step in self.steps))


class _Passes:
    """Gathers the passes of a change, step by step."""

    def __init__(self, inputs: int) -> None:
        self._inputs = inputs
        self._gain: Tensor | None = None
        self._mixed: list[tuple[tuple[RowStep, ...], Rotation]] = []
        self._steps: list[RowStep] = []
        self._waiting: Tensor | None = None  # factors of inputs, for the next step that reads them

    def add(self, step: Step) -> None:
        """A step after the others."""
        if isinstance(step, Replace):
            self._gain, self._mixed, self._steps, self._waiting = step.gain, [], [], None
        elif isinstance(step, Scale) and step.axis == "inputs":
            waiting = self._waiting
            self._waiting = step.factors if waiting is None else waiting * step.factors
        elif isinstance(step, Scale):
            self._steps.append(RowStep(outputs=step.factors))
        elif step.axis == "outputs":
            self._mixed.append((tuple(self._steps), step.rotation))
            self._steps = []
        else:
            self._then(step.rotation.of_inputs(self._inputs, self._waiting))
            self._waiting = None

    def prepared(self) -> Prepared:
        """All of them."""
        if self._waiting is not None:
            self._then(RowStep(inputs=self._waiting))
        return Prepared(self._gain, tuple(self._mixed), tuple(self._steps))

    def _then(self, step: RowStep) -> None:
        """A step of inputs, which a factor of the row before it joins."""
        if self._steps and self._steps[-1].inputs is None:
            step = replace(step, outputs=self._steps.pop().outputs)
        self._steps.append(step)


def _empty(weight: Tensor) -> Tensor:
    return torch.empty(weight.shape, dtype=torch.float32)


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
