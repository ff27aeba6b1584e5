"""The weight of a linear, as what has been read of its source, and how codes come of that.

There are floats, from which a scheme chooses the nearest codes, and codes that somebody else has
chosen, which are taken as they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from qwen3_ascend.checkpoint.layout import ND, Layout
from qwen3_ascend.checkpoint.linear import Linear
from qwen3_ascend.checkpoint.schemes import Codes, Scheme
from qwen3_ascend.checkpoint.schemes.pieces import Packed, Piece, Stack, Sums
from qwen3_ascend.native import Kernels


class Weights(ABC):
    """The weight [N, K] of a linear as its source has it; its parts are stacked along outputs."""

    @abstractmethod
    def pack_piece(self, scheme: Scheme, piece: Piece, layout: Layout, kernels: Kernels) -> Packed:
        """One piece as it is stored; the same bytes whatever the kernels and the division.

        Raises:
            NotFinite: if a weight of the piece is not finite.
        """

    @abstractmethod
    def floats(self) -> Tensor:
        """The whole weight that they stand for, float32 [N, K]."""

    @abstractmethod
    def errors(self, stored: Linear, piece: Piece, kernels: Kernels) -> Sums | None:
        """What `pack_piece` reported, measured again from the stored bytes of the piece."""

    @abstractmethod
    def has_codes(self, stored: Linear, piece: Piece) -> bool:
        """Whether a stored piece holds the source's codes; True of a source that has none."""


@dataclass(frozen=True)
class ChosenWeights(Weights):
    """Floats: the scheme chooses the nearest codes."""

    stack: Stack

    @override
    def pack_piece(self, scheme: Scheme, piece: Piece, layout: Layout, kernels: Kernels) -> Packed:
        return scheme.pack_piece(self.stack, piece, layout, kernels)

    @override
    def floats(self) -> Tensor:
        return torch.cat([part.float() for part in self.stack.parts])

    @override
    def errors(self, stored: Linear, piece: Piece, kernels: Kernels) -> Sums | None:
        return stored.scheme.errors(stored, self.stack, piece, kernels)

    @override
    def has_codes(self, stored: Linear, piece: Piece) -> bool:
        return True


@dataclass(frozen=True)
class TakenWeights(Weights):
    """Codes that somebody else has chosen, and that are kept.

    Attributes:
        parts: each a linear in plain layout.
    """

    parts: tuple[Linear, ...]

    @override
    def pack_piece(self, scheme: Scheme, piece: Piece, layout: Layout, kernels: Kernels) -> Packed:
        """The plan has seen to it that the scheme is the one whose codes these are."""
        return Packed(scheme.pack(self._codes(piece), layout), None)

    @override
    def floats(self) -> Tensor:
        return torch.cat([part.dequantize() for part in self.parts])

    @override
    def errors(self, stored: Linear, piece: Piece, kernels: Kernels) -> Sums | None:
        return None

    @override
    def has_codes(self, stored: Linear, piece: Piece) -> bool:
        return same_codes(stored.codes(), self._codes(piece))

    def _codes(self, piece: Piece) -> Codes:
        """The codes of a piece: views if it lies in one part, else copies."""
        found = [part.codes() for part in self._narrowed(piece)]
        if len(found) == 1:
            return found[0]
        places = self.parts[0].scheme.places(ND)
        return {
            suffix: torch.cat([codes[suffix] for codes in found], places[suffix]["outputs"].axis)
            for suffix in found[0]
        }

    def _narrowed(self, piece: Piece) -> list[Linear]:
        if piece.axis == "inputs":
            span = (piece.start, piece.stop - piece.start)
            return [part.narrow("inputs", [span]) for part in self.parts]
        found, row = [], 0
        for part in self.parts:
            outputs = part.shape[0]
            start, stop = max(piece.start - row, 0), min(piece.stop - row, outputs)
            if start < stop:
                found.append(part.narrow("outputs", [(start, stop - start)]))
            row += outputs
        return found


def same_codes(found: Codes, expected: Codes) -> bool:
    """Whether two weights are the same, bit by bit."""
    return found.keys() == expected.keys() and all(
        torch.equal(_bits(found[suffix]), _bits(expected[suffix])) for suffix in expected
    )


def _bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor: 0.0 is not -0.0."""
    return tensor.contiguous().view(torch.uint8)
