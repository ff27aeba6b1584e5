"""What every scheme promises: how a linear lies on disk, and what its bytes mean.

A scheme is an instance: its fields are its parameters, such as a group size. It keeps two questions
apart. Which codes stand for a weight (`choose` rounds to the nearest; another algorithm may supply
others), and how codes lie in the stored tensors (`pack`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from qwen3_ascend.checkpoint.layout import Cut, Layout, Place
from qwen3_ascend.checkpoint.schemes.pieces import (
    Packed,
    Piece,
    Stack,
    Sums,
    divide,
    measured,
)
from qwen3_ascend.files.safetensors import Form
from qwen3_ascend.native import Kernels

if TYPE_CHECKING:
    from qwen3_ascend.checkpoint.linear import Linear

Codes = Mapping[str, Tensor]
"""A weight in a scheme's own terms, in plain order: a tensor for each stored one, by suffix."""

TEMPORARY_BYTES = 32
"""Memory for each weight of a piece that torch works on: float64 blocks for the error sums."""


class Input(Enum):
    """What a linear wants to be fed."""

    FLOAT = auto()
    """Activations in the compute type."""

    INT8_PER_TOKEN = auto()
    """int8 codes, with a scale for each token that is found at run time."""

    INT8_STATIC = auto()
    """int8 codes under a scale and an offset that calibration has fixed."""


@dataclass(frozen=True)
class InputRange:
    """What calibration has seen of the inputs of a linear: all of them lie in between.

    Raises:
        ValueError: on construction, if a bound is not finite or the bounds are in the wrong order.
    """

    least: float
    largest: float

    def __post_init__(self) -> None:
        if not -math.inf < self.least <= self.largest < math.inf:
            raise ValueError(f"inputs from {self.least} to {self.largest} are no range")


class Scheme(ABC):
    """How weights are quantized and stored. Meaning only: kernels live in runtime/backends.

    Subclasses are frozen dataclasses whose fields are parameters.

    Logical weights are [*batch, N, K]; most have no batch axes. A bias is no part of a scheme.
    """

    name: ClassVar[str]
    input: ClassVar[Input]

    @property
    def parameters(self) -> dict[str, Any]:
        """The fields of a subclass, which is a frozen dataclass, by name."""
        return dict(vars(self))

    @abstractmethod
    def forms(self, shape: Sequence[int], layout: Layout) -> dict[str, Form]:
        """The stored tensors of a logical [*batch, N, K] weight, by suffix; "weight" is one."""

    @abstractmethod
    def places(self, layout: Layout) -> dict[str, dict[Cut, Place]]:
        """Where outputs and inputs lie in each stored tensor. A tensor that an axis does not divide
        (such as a scale for each output, by inputs) leaves it out, and is kept whole by a cut."""

    @abstractmethod
    def choose(self, weight: Tensor) -> Codes:
        """The codes nearest to a finite float weight [*batch, N, K]."""

    def pack(self, codes: Codes, layout: Layout) -> dict[str, Tensor]:
        """The stored tensors of codes, as `forms` says: the weight laid out, the others as they
        are."""
        return {**codes, "weight": layout.pack(codes["weight"])}

    def unpack(self, tensors: Mapping[str, Tensor], shape: Sequence[int], layout: Layout) -> Codes:
        """The codes of stored tensors; KeyError if one is missing."""
        held = {suffix: tensors[suffix] for suffix in self.places(layout)}
        return {**held, "weight": layout.unpack(held["weight"], shape)}

    @abstractmethod
    def decode(self, codes: Codes) -> Tensor:
        """The weight that codes stand for, float32 [*batch, N, K]."""

    @abstractmethod
    def product(self, codes: Codes, x: Tensor) -> Tensor:
        """The product as defined: float x [T, K] and codes [N, K] to float32 [T, N]."""

    def for_inputs(
        self,
        tensors: Mapping[str, Tensor],
        shape: Sequence[int],
        layout: Layout,
        inputs: InputRange,
    ) -> Mapping[str, Tensor]:
        """The stored tensors of a weight, or of a piece of it, for inputs of another range; the
        same ones, unless the scheme fixes beforehand how inputs are quantized."""
        return tensors

    def of_some_inputs(
        self, tensors: Mapping[str, Tensor], shape: Sequence[int], layout: Layout
    ) -> Mapping[str, Tensor]:
        """The stored tensors of some inputs of a weight, made right.

        Args:
            tensors: those that inputs divide are cut already, the others are the whole's.
            shape: what is left, [*batch, N, K].
            layout: of the weight.
        """
        return tensors

    def pieces(self, shape: Sequence[int], layout: Layout) -> tuple[Piece, ...]:
        """How a weight is divided, in the order in which the pieces lie in storage."""
        return divide(shape, self.forms(shape, layout), self.places(layout))

    def pack_piece(self, source: Stack, piece: Piece, layout: Layout, kernels: Kernels) -> Packed:
        """Chooses the nearest codes for one piece of a float weight, and packs them.

        The same bytes result whatever the kernels and the number of parts.

        Raises:
            NotFinite: if a weight of the piece is not finite.
        """
        weight = source.piece(piece)
        kernels.check_finite(weight)
        codes = self.choose(weight)
        return Packed(self.pack(codes, layout), measured(weight, self.decode(codes), piece.axis))

    def errors(self, stored: Linear, source: Stack, piece: Piece, kernels: Kernels) -> Sums | None:
        """What `pack_piece` reported, measured again from the stored bytes of the piece."""
        return measured(source.piece(piece), stored.dequantize(), piece.axis)

    def temporary_bytes(self, layout: Layout, source_itemsize: int) -> int:
        """Memory that `pack_piece` takes for each weight, its source and its result included."""
        return TEMPORARY_BYTES

    def __str__(self) -> str:
        """For people: the name, and the parameters if there are any; what is off is not said."""
        named = {key.replace("_", " "): value for key, value in self.parameters.items()}
        said = [k if v is True else f"{k} {v}" for k, v in named.items() if v is not False]
        return f"{self.name} ({', '.join(said)})" if said else self.name

    def to_json(self) -> dict[str, Any]:
        """The manifest's form: the name and every parameter."""
        return {"name": self.name, **self.parameters}
