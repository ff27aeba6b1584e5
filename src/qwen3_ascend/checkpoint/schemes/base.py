"""What every scheme promises: a linear as it lies on disk, and what its bytes mean."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from qwen3_ascend import native
from qwen3_ascend.checkpoint.layout import Layout
from qwen3_ascend.checkpoint.schemes.pieces import Packed, Piece, Stack, Sums

LinearShape = tuple[int, int]
"""(N outputs, K inputs)."""

StoredForm = tuple[torch.dtype, tuple[int, ...]]
"""dtype and storage shape of one tensor on disk."""


ROWS_AT_A_TIME = 256
"""Rows worked on together: keeps float32 temporaries within the cache's reach."""


@dataclass(frozen=True)
class Linear(ABC):
    """One linear, packed: what is on disk is what is in memory.

    Subclasses add their tensor fields; a field's name is the suffix of its name on disk
    ("<linear>.weight", "<linear>.scale"). Meaning only: kernels live in runtime/backends.

    Attributes:
        shape: logical (N, K).
        layout: how `weight` lies in storage.
        weight: in storage shape.
        bias: [N] bfloat16, or None.
    """

    scheme: ClassVar[str]
    bits: ClassVar[int]

    shape: LinearShape
    layout: Layout
    weight: Tensor
    bias: Tensor | None

    @classmethod
    @abstractmethod
    def default_layout(cls) -> Layout:
        """The layout that A2/A3 kernels want for this scheme's weight."""

    @classmethod
    @abstractmethod
    def stored(cls, shape: LinearShape, layout: Layout, bias: bool) -> dict[str, StoredForm]:
        """What `tensors` of a linear of this shape will hold, without any data."""

    @classmethod
    @abstractmethod
    def pieces(cls, shape: LinearShape, layout: Layout) -> tuple[Piece, ...]:
        """How a linear is cut, in the order in which the pieces lie in storage."""

    @classmethod
    @abstractmethod
    def pack(cls, source: Stack, piece: Piece, layout: Layout, kernels: native.Kernels) -> Packed:
        """Quantizes and packs one piece of a float [N, K] weight.

        The same bytes result whatever the kernels and the number of parts.

        Raises:
            native.NotFinite: if a weight of the piece is not finite.
        """

    @abstractmethod
    def errors(self, source: Stack, piece: Piece, kernels: native.Kernels) -> Sums | None:
        """What `pack` reported for a piece, measured again from the stored bytes."""

    @classmethod
    def quantize(cls, weight: Tensor, bias: Tensor | None, layout: Layout) -> Self:
        """Quantizes and packs a whole float [N, K] weight, which must be finite."""
        outputs, inputs = weight.shape
        shape, kernels, source = (outputs, inputs), native.best(), Stack((weight,))
        tensors = {
            suffix: torch.empty(storage, dtype=dtype)
            for suffix, (dtype, storage) in cls.stored(shape, layout, False).items()
        }
        for piece in cls.pieces(shape, layout):
            for suffix, (start, data) in cls.pack(source, piece, layout, kernels).tensors.items():
                place = start // data.element_size()
                tensors[suffix].view(-1)[place : place + data.numel()] = data.reshape(-1)
        stored_bias = store_bias(bias)
        return cls.from_tensors(shape, layout, with_bias(tensors, stored_bias))

    @classmethod
    @abstractmethod
    def from_tensors(
        cls, shape: LinearShape, layout: Layout, tensors: Mapping[str, Tensor]
    ) -> Self:
        """The linear of stored tensors by suffix; KeyError if one is missing."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by suffix."""

    @abstractmethod
    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight the bytes stand for, a few hundred rows at a time: (rows, float32 [R, K])."""

    @abstractmethod
    def reference(self, x: Tensor) -> Tensor:
        """The product as defined: float x [T, K] to float32 [T, N], slow and exact."""

    def dequantize(self) -> Tensor:
        """The weight the bytes stand for, float32 [N, K]."""
        return torch.cat([block for _, block in self.blocks()])


def row_slices(rows: int) -> Iterator[slice]:
    """Slices of ROWS_AT_A_TIME that cover `rows`."""
    for start in range(0, rows, ROWS_AT_A_TIME):
        yield slice(start, min(start + ROWS_AT_A_TIME, rows))


def bias_form(shape: LinearShape, bias: bool) -> dict[str, StoredForm]:
    """The stored form of an optional bias."""
    return {"bias": (torch.bfloat16, (shape[0],))} if bias else {}


def with_bias(tensors: dict[str, Tensor], bias: Tensor | None) -> dict[str, Tensor]:
    """Adds an optional bias to a linear's tensors."""
    return tensors if bias is None else {**tensors, "bias": bias}


def store_bias(bias: Tensor | None) -> Tensor | None:
    """A bias as it is stored: bfloat16."""
    return None if bias is None else bias.to(torch.bfloat16)


def add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """Adds a stored bias to a float32 product."""
    return y if bias is None else y + bias.float()
