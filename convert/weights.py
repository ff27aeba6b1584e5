"""The weight of a linear, as what has been read of its source, and how codes come of that.

There are floats, from which a scheme chooses the nearest codes piece by piece, or a quantizer those
of the whole linear; and codes that somebody else has chosen, which are taken as they are.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from typing_extensions import override

from qwen3_ascend.checkpoint.layout import ND, Layout
from qwen3_ascend.checkpoint.linear import Linear
from qwen3_ascend.checkpoint.schemes import Codes, Scheme
from qwen3_ascend.checkpoint.schemes.grid import Grid, IntegerScheme
from qwen3_ascend.checkpoint.schemes.pieces import Packed, Piece, Stack, Sums
from qwen3_ascend.convert.quantizers.base import Choose, Chosen
from qwen3_ascend.convert.transforms.changes import FindChanges
from qwen3_ascend.convert.transforms.stack import ChangedStack
from qwen3_ascend.files.threads import Ahead, Crew
from qwen3_ascend.native import Kernels

CHUNK_WEIGHTS = 1 << 20
"""Weights whose codes a quantizer chooses together."""

CHUNK_BYTES = 32
"""Memory for each of them: as float32, in another order, as codes, and what torch needs."""


@dataclass(frozen=True)
class Choosing:
    """How the codes of whole matrices are chosen.

    Attributes:
        prepare: gives the quantizer for the inputs of a matrix, by its number in the linear; once.
        kernels: to look with whether weights are finite.
        advance: called before each chunk; it may raise to end the work.
        crew: whose threads quantize the experts of a linear, one each.
    """

    prepare: Callable[[int], Choose]
    kernels: Kernels
    advance: Callable[[], None]
    crew: Crew


def chunk_outputs(inputs: int) -> int:
    """Outputs of a linear of K inputs whose codes are chosen together."""
    return max(1, CHUNK_WEIGHTS // inputs)


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

    @abstractmethod
    def quantized(self, choosing: Choosing, number: int = 0) -> Weights:
        """These weights with codes that a quantizer has chosen for all of them.

        Args:
            choosing: see there.
            number: of the matrix, if these are the weights of one of several.

        Raises:
            NotFinite: if a weight is not finite; its row counts from the chunk's.
        """

    @abstractmethod
    def changed(self, find: FindChanges, kernels: Kernels) -> Weights:
        """These weights after a change of each part."""

    def close(self) -> None:
        """Drops what is under way for pieces that nobody will ask for."""
        return


@dataclass(frozen=True)
class ChosenWeights(Weights):
    """Floats: the scheme chooses the nearest codes."""

    stack: Stack

    @override
    def pack_piece(self, scheme: Scheme, piece: Piece, layout: Layout, kernels: Kernels) -> Packed:
        return scheme.pack_piece(self.stack, piece, layout, kernels)

    @override
    def floats(self) -> Tensor:
        return self.stack.piece(Piece("outputs", 0, self.stack.shape[0])).float()

    @override
    def errors(self, stored: Linear, piece: Piece, kernels: Kernels) -> Sums | None:
        return stored.scheme.errors(stored, self.stack, piece, kernels)

    @override
    def has_codes(self, stored: Linear, piece: Piece) -> bool:
        return True

    @override
    def quantized(self, choosing: Choosing, number: int = 0) -> Weights:
        choose, (outputs, inputs) = choosing.prepare(number), self.stack.shape
        integers = torch.empty((outputs, inputs), dtype=torch.int8)
        step, scales = chunk_outputs(inputs), []
        for start in range(0, outputs, step):
            choosing.advance()
            piece = Piece("outputs", start, min(start + step, outputs))
            rows = self.stack.piece(piece)
            choosing.kernels.check_finite(rows)
            found = choose(rows.float())
            integers[start : piece.stop] = found.integers
            scales.append(found.scales)
        return QuantizedWeights(self.stack, Chosen(integers, torch.cat(scales)))

    @override
    def changed(self, find: FindChanges, kernels: Kernels) -> Weights:
        return ChosenWeights(ChangedStack(self.stack.parts, find, kernels))


@dataclass(frozen=True)
class QuantizedWeights(ChosenWeights):
    """Floats, and the integers and scales that a quantizer has chosen for the whole linear.

    Only the integers and scales are in memory as a whole. Errors are those of the integers and
    scales against the floats.
    """

    chosen: Chosen

    @override
    def pack_piece(self, scheme: Scheme, piece: Piece, layout: Layout, kernels: Kernels) -> Packed:
        """The plan has seen to it that the scheme is the one whose grid was quantized to."""
        assert isinstance(scheme, IntegerScheme)
        integers, scales = self._of(piece, scheme.grid)
        tensors = scheme.pack(scheme.codes(integers, scales), layout)
        stored = Linear(scheme, tuple(integers.shape), layout, tensors)
        return Packed(tensors, self.errors(stored, piece, kernels))

    def _of(self, piece: Piece, grid: Grid) -> tuple[Tensor, Tensor]:
        """Integers and scales of a piece; of inputs it begins and ends with a group."""
        span = slice(piece.start, piece.stop)
        if piece.axis == "outputs":
            return self.chosen.integers[span], self.chosen.scales[span]
        width = grid.width(self.stack.shape[1])
        groups = slice(piece.start // width, -(-piece.stop // width))
        return self.chosen.integers[:, span], self.chosen.scales[:, groups]


@dataclass(frozen=True)
class ExpertWeights(Weights):
    """The weights of linears that are stored as one, [experts, N, K]: each has its own source.

    What a change and a quantizer make of an expert's weights is large, and kept for the last few
    experts only: pieces come expert by expert.

    Attributes:
        matrices: of each expert, as the source has them.
        finds: gives the changes of each; None for what stays as it is.
        kernels: to change with.
        kept: how many threads ask for pieces, each for those of one expert after the other.
        ahead: gives each expert with its codes, in their order, if they are chosen together.
    """

    matrices: tuple[Weights, ...]
    finds: tuple[FindChanges | None, ...]
    kernels: Kernels
    kept: int
    ahead: Ahead[Weights] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _made: dict[int, Weights] = field(default_factory=dict, init=False)

    @override
    def pack_piece(self, scheme: Scheme, piece: Piece, layout: Layout, kernels: Kernels) -> Packed:
        return self._of(piece).pack_piece(scheme, replace(piece, matrix=0), layout, kernels)

    @override
    def floats(self) -> Tensor:
        return torch.stack([self._expert(number).floats() for number in range(len(self.matrices))])

    @override
    def errors(self, stored: Linear, piece: Piece, kernels: Kernels) -> Sums | None:
        return self._of(piece).errors(stored, replace(piece, matrix=0), kernels)

    @override
    def has_codes(self, stored: Linear, piece: Piece) -> bool:
        return self._of(piece).has_codes(stored, replace(piece, matrix=0))

    @override
    def quantized(self, choosing: Choosing, number: int = 0) -> Weights:
        """Of the experts some are quantized ahead of the pieces that are asked for."""

        def quantize(expert: int) -> Weights:
            return self._changed(expert).quantized(choosing, expert)

        return replace(self, ahead=Ahead(choosing.crew, quantize, len(self.matrices)))

    @override
    def close(self) -> None:
        if self.ahead is not None:
            self.ahead.close()

    @override
    def changed(self, find: FindChanges, kernels: Kernels) -> Weights:
        raise AssertionError("each expert is changed by itself")

    def _of(self, piece: Piece) -> Weights:
        return self._expert(piece.matrix)

    def _expert(self, number: int) -> Weights:
        if self.finds[number] is None and self.ahead is None:
            return self.matrices[number]
        with self._lock:
            if number not in self._made:
                while len(self._made) >= self.kept:
                    del self._made[next(iter(self._made))]
                made = self._changed(number) if self.ahead is None else self.ahead.result(number)
                self._made[number] = made
            return self._made[number]

    def _changed(self, number: int) -> Weights:
        return in_one(self.matrices[number : number + 1], [self.finds[number]], self.kernels)


def in_one(
    matrices: Sequence[Weights],
    finds: Sequence[FindChanges | None],
    kernels: Kernels,
    threads: int = 1,
) -> Weights:
    """The weights of a linear after changes.

    Args:
        matrices: of each of its matrices.
        finds: gives the changes of each; None for what stays as it is.
        kernels: to change with.
        threads: that ask for pieces. A conversion gives all pieces of a linear to one.
    """
    if len(matrices) > 1:
        return ExpertWeights(tuple(matrices), tuple(finds), kernels, threads)
    (weights,), (find,) = matrices, finds
    return weights if find is None else weights.changed(find, kernels)


class KeptWeights(Weights):
    """Codes that somebody else has chosen, and that are kept, whatever form they come in."""

    @override
    def quantized(self, choosing: Choosing, number: int = 0) -> Weights:
        return self

    @override
    def changed(self, find: FindChanges, kernels: Kernels) -> Weights:
        raise AssertionError("the plan refuses to change codes")


@dataclass(frozen=True)
class TakenWeights(KeptWeights):
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
