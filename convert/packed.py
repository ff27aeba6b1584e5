"""Linears that a source holds as integers of 4 or 8 bits, packed into int32 words.

    weight = (integer - zero point of its group) * scale of its group

Integers of 4 bits in groups of neighbouring inputs are those of the scheme w4a16 and can be taken,
with zero points or without (every one is 8 then). Others are decoded: the groups of that scheme are
of neighbours.

The scheme counts integers from -8 and has offsets instead of zero points:

    weight = (integer - 8 + (8 - zero point)) * scale = (code + offset) * scale

A scale that is taken becomes bfloat16, in which npu_weight_quant_batchmatmul reads it, and engines
that compute in bfloat16 do. Those of float16 are rounded by that, which moves a weight by at most
2^-8 of itself; the figure of a linear says what it comes to.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from qwen3_ascend.checkpoint.layout import Cut, Layout
from qwen3_ascend.checkpoint.linear import Linear
from qwen3_ascend.checkpoint.schemes import W4A16, Codes, Scheme
from qwen3_ascend.checkpoint.schemes.pieces import Packed, Piece, Stack, Sums, measured
from qwen3_ascend.checkpoint.schemes.w4a16 import GROUPS
from qwen3_ascend.convert import exchange
from qwen3_ascend.convert.decoded import DECODED, DecodedMatrix
from qwen3_ascend.convert.encodings import (
    FLOATS,
    Encoding,
    Read,
    check_coded,
    first_place,
    require_scales,
)
from qwen3_ascend.convert.weights import ChosenWeights, KeptWeights, Weights, same_codes
from qwen3_ascend.errors import DamagedSourceError
from qwen3_ascend.files.safetensors import TensorSlot
from qwen3_ascend.native import Kernels

WORD_BITS = 32

UNPACKING_BYTES = 20
"""Memory for each weight of a piece that is unpacked: two int32, scale, zero point and product in
float32."""

TAKING_BYTES = 128
"""Memory for each weight of a piece that is taken and measured, with what the allocator keeps of
the float64 blocks that come and go: about twice of what lives at a time, as measured."""


@dataclass(frozen=True)
class Packing:
    """How a format lays out the tensors of a linear.

    Attributes:
        weight, zeros, scale, groups: suffixes of its tensors: packed integers, packed zero points,
            floats, and the group of each input.
        also: suffixes of tensors that say nothing further.
        inputs_first: whether all are [inputs or groups, outputs], or the other way round.
        packs: the axis along which the words of the weight hold neighbours; those of zero points
            hold outputs.
        places: which integer of a word, from the lowest bits, each neighbour is; None for their
            order.
        added: to a zero point that is stored.
    """

    weight: str
    zeros: str
    scale: str
    groups: str | None
    inputs_first: bool
    packs: Cut
    also: tuple[str, ...] = ()
    places: tuple[int, ...] | None = None
    added: int = 0

    def oriented(self, tensor: Tensor) -> Tensor:
        """A stored matrix as [outputs, inputs or groups]: a view."""
        return tensor.t() if self.inputs_first else tensor

    def shape(self, outputs: int, inputs: int) -> tuple[int, int]:
        """The shape of a stored matrix."""
        return (inputs, outputs) if self.inputs_first else (outputs, inputs)


GPTQ = Packing("qweight", "qzeros", "scales", "g_idx", True, "inputs", added=1)
"""Of AutoGPTQ, whose kernels add one to a zero point: `QuantLinear` of auto_gptq and gptqmodel."""

GPTQ_V2 = replace(GPTQ, added=0)
"""Of gptqmodel, `checkpoint_format: gptq_v2`."""

AWQ = Packing("qweight", "qzeros", "scales", None, True, "outputs", places=(0, 4, 1, 5, 2, 6, 3, 7))
"""Of AutoAWQ, `version: gemm`: `WQLinear_GEMM`, and AWQ_REVERSE_ORDER of its packing_utils.py."""

COMPRESSED = Packing(
    exchange.WEIGHT_PACKED, exchange.WEIGHT_ZERO_POINT, exchange.WEIGHT_SCALE, "weight_g_idx",
    False, "inputs", also=(exchange.WEIGHT_SHAPE,),
)  # fmt: skip
"""Of compressed-tensors, `pack-quantized`: `PackedQuantizationCompressor`."""


@dataclass(frozen=True, eq=False)
class PackedMatrix(DecodedMatrix):
    """The weight [N, K] of one linear.

    Attributes:
        packing: how the words hold the integers.
        bits: of an integer.
        words: int32, oriented: the packed axis is shorter.
        scales: floats [N, G].
        zeros: int32 [ceil(N / integers of a word), G], words of zero points as they are stored;
            None if each zero point is half of the range.
        groups: int64 [K], the group of each input.
    """

    packing: Packing
    bits: int
    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    groups: Tensor

    @property
    @override
    def shape(self) -> tuple[int, int]:
        return self.scales.shape[0], self.groups.shape[0]

    @override
    def decode(self, outputs: slice, inputs: slice) -> Tensor:
        scales = self.scales[outputs].index_select(1, self.groups[inputs])
        return self._from_zero(outputs, inputs).float().mul_(scales.float())

    @property
    def middle(self) -> int:
        """Half of the range of an integer: the zero point of all groups, if none is stored."""
        return 1 << self.bits - 1

    def integers(self, outputs: slice, inputs: slice) -> Tensor:
        """int16 [n, k], from 0."""
        if self.packing.packs == "outputs":
            return self._unpacked(self.words[:, inputs], outputs)
        return self._unpacked(self.words[outputs].t(), inputs).t().contiguous()

    def zero_points(self, outputs: slice) -> Tensor:
        """int16 [n, G], if they are stored."""
        assert self.zeros is not None, "each is half of the range"
        return self._unpacked(self.zeros, outputs) + self.packing.added

    def _from_zero(self, outputs: slice, inputs: slice) -> Tensor:
        """int16 [n, k]: the integers less their zero points."""
        integers = self.integers(outputs, inputs)
        if self.zeros is None:
            return integers.sub_(self.middle)
        return integers.sub_(self.zero_points(outputs).index_select(1, self.groups[inputs]))

    def _unpacked(self, words: Tensor, span: slice) -> Tensor:
        """Some rows of the integers that lie in words along the first axis, int16."""
        per_word = WORD_BITS // self.bits
        first = span.start // per_word
        needed = words[first : -(-span.stop // per_word)]
        rows = unpack_words(needed, self.bits, self.packing.places)
        return rows[span.start - first * per_word : span.stop - first * per_word]


@dataclass(frozen=True)
class TakenIntegers(KeptWeights):
    """Integers that somebody else has chosen for w4a16, and that are kept; scales are bfloat16.

    Attributes:
        parts: of 4 bits, in the groups of the scheme, and with zero points if that has them.
    """

    parts: tuple[PackedMatrix, ...]

    @property
    def _is_exact(self) -> bool:
        return all(part.scales.dtype == torch.bfloat16 for part in self.parts)

    @override
    def pack_piece(self, scheme: Scheme, piece: Piece, layout: Layout, kernels: Kernels) -> Packed:
        """The plan has seen to it that the scheme is the one whose integers these are."""
        codes = self._codes(scheme, piece)
        packed = scheme.pack(codes, layout)
        return Packed(packed, self._sums(scheme, codes, piece))

    @override
    def floats(self) -> Tensor:
        return torch.cat([part.float() for part in self.parts])

    @override
    def errors(self, stored: Linear, piece: Piece, kernels: Kernels) -> Sums | None:
        return self._sums(stored.scheme, stored.codes(), piece)

    @override
    def has_codes(self, stored: Linear, piece: Piece) -> bool:
        return same_codes(stored.codes(), self._codes(stored.scheme, piece))

    def _sums(self, scheme: Scheme, codes: Codes, piece: Piece) -> Sums | None:
        """What rounding the scales has changed; None if it cannot have changed anything."""
        if self._is_exact:
            return None
        exact = torch.cat([part.decode(*spans) for part, spans in self._parts(piece)])
        return measured(exact, scheme.decode(codes), piece.axis)

    def _codes(self, scheme: Scheme, piece: Piece) -> Codes:
        assert isinstance(scheme, W4A16)
        integers, scales, offsets = [], [], []
        for part, (outputs, inputs) in self._parts(piece):
            groups = slice(inputs.start // scheme.group, -(-inputs.stop // scheme.group))
            integers.append(part.integers(outputs, inputs).sub_(part.middle).to(torch.int8))
            scales.append(part.scales[outputs, groups].float())
            if scheme.zero_points:
                offsets.append(part.middle - part.zero_points(outputs)[:, groups])
        if not scheme.zero_points:
            return scheme.codes(torch.cat(integers), torch.cat(scales))
        return scheme.offset_codes(torch.cat(integers), torch.cat(scales), torch.cat(offsets))

    def _parts(self, piece: Piece) -> list[tuple[PackedMatrix, tuple[slice, slice]]]:
        """The parts that a piece lies in, with the outputs and inputs of it."""
        found, row = [], 0
        for part in self.parts:
            outputs, inputs = part.shape
            if piece.axis == "inputs":
                found.append((part, (slice(0, outputs), slice(piece.start, piece.stop))))
            elif piece.start < row + outputs and row < piece.stop:
                rows = slice(max(piece.start - row, 0), min(piece.stop - row, outputs))
                found.append((part, (rows, slice(0, inputs))))
            row += outputs
        return found


@dataclass(frozen=True)
class PackedEncoding(Encoding):
    """Packed integers; see the module.

    Attributes:
        said: the place of the source that says so, for errors.
        format: its name, for people.
        packing: how the tensors are laid out.
        bits: of an integer, 4 or 8.
        group: inputs of a group; None if an output has one scale.
        symmetric: whether every zero point is half of the range.
        ordered: whether groups are not of neighbouring inputs, but as a tensor says.
        scheme: w4a16 if the integers are taken.
    """

    said: str
    format: str
    packing: Packing
    bits: int
    group: int | None
    symmetric: bool
    ordered: bool
    scheme: Scheme | None = None

    @property
    @override
    def kind(self) -> str:
        groups = "one scale for each output" if self.group is None else f"groups of {self.group}"
        words = [f"{self.format} of {self.bits} bits", groups]
        words += [] if self.symmetric else ["zero points"]
        words += ["an order of the inputs"] if self.ordered else []
        version = ["version 2"] if self.packing is GPTQ_V2 else []
        return ", ".join([*words, *version, *(["taken"] if self.scheme else [])])

    @property
    @override
    def known(self) -> tuple[str, ...]:
        packing = self.packing
        named = (packing.weight, packing.zeros, packing.scale, packing.groups, *packing.also)
        return tuple(suffix for suffix in named if suffix is not None)

    @property
    def why_decoded(self) -> str | None:
        """Why the integers are those of no scheme; None if w4a16 has them."""
        if self.bits != W4A16().grid.bits:
            return f"they have {self.bits} bits"
        if self.ordered:
            return "their groups are not of neighbouring inputs (act-order)"
        if self.group not in GROUPS:
            size = "all inputs" if self.group is None else f"{self.group} inputs"
            return f"they are in groups of {size}, and w4a16 has {', '.join(map(str, GROUPS))}"
        return None

    def taken(self) -> PackedEncoding:
        """The same with the scheme whose codes they are, if there is one."""
        if self.group is None or self.why_decoded is not None:
            return self
        return replace(self, scheme=W4A16(self.group, zero_points=not self.symmetric))

    @override
    def under(self, scheme: Scheme | None) -> Encoding:
        return self if scheme == self.scheme else replace(self, scheme=None)

    @override
    def suffixes(
        self, linear: str, shape: tuple[int, int], slots: Mapping[str, TensorSlot]
    ) -> tuple[str, ...]:
        packing, (outputs, inputs) = self.packing, shape
        said, groups = f"{self.said} says {self.kind}", self._groups(inputs)
        found = []

        def check(suffix: str, types: Collection[torch.dtype], wanted: tuple[int, ...]) -> None:
            check_coded(f"{linear}.{suffix}", types, [wanted], slots, said)
            found.append(suffix)

        words = self._words(outputs)
        packed = (words, inputs) if packing.packs == "outputs" else (outputs, self._words(inputs))
        check(packing.weight, [torch.int32], packing.shape(*packed))
        if not self.symmetric or f"{linear}.{packing.zeros}" in slots:
            check(packing.zeros, [torch.int32], packing.shape(words, groups))
        check(packing.scale, FLOATS, packing.shape(outputs, groups))
        if self.ordered or f"{linear}.{packing.groups}" in slots:
            check(str(packing.groups), [torch.int32], (inputs,))
        for suffix in packing.also:
            check(suffix, [torch.int64, torch.int32], (2,))
        return tuple(found)

    @override
    def weights(self, parts: Mapping[str, Read]) -> Weights:
        found = tuple(self._matrix(linear, read) for linear, read in parts.items())
        return ChosenWeights(Stack(found)) if self.scheme is None else TakenIntegers(found)

    @override
    def temporary_bytes(self, scheme: Scheme, layout: Layout, itemsize: int) -> int:
        if self.scheme is not None:
            return TAKING_BYTES
        return UNPACKING_BYTES + scheme.temporary_bytes(layout, DECODED.itemsize)

    def _groups(self, inputs: int) -> int:
        return 1 if self.group is None else -(-inputs // self.group)

    def _words(self, count: int) -> int:
        return -(-count * self.bits // WORD_BITS)

    def _matrix(self, linear: str, read: Read) -> PackedMatrix:
        packing, words = self.packing, self.packing.oriented(read[self.packing.weight])
        scales = packing.oriented(read[packing.scale])
        largest = 1 << self.bits
        require_scales(f"{linear}.{packing.scale}", read[packing.scale], largest, signed=True)
        inputs = words.shape[1] if packing.packs == "outputs" else self._inputs(linear, read)
        return PackedMatrix(
            packing, self.bits, words, scales, self._zeros(linear, read),
            self._group_of_each(linear, read, inputs),
        )  # fmt: skip

    def _inputs(self, linear: str, read: Read) -> int:
        """How many inputs there are: all that the words hold, unless a tensor says how many."""
        if (said := read.get(exchange.WEIGHT_SHAPE)) is not None:
            return int(said[1])
        return read[self.packing.weight].shape[0] * WORD_BITS // self.bits

    def _zeros(self, linear: str, read: Read) -> Tensor | None:
        """The words of the zero points; None of symmetric integers, which they have to agree to."""
        packing, stored = self.packing, read.get(self.packing.zeros)
        if stored is None or not self.symmetric:
            return None if stored is None else packing.oriented(stored)
        middle = 1 << self.bits - 1
        wrong = stored != _word_of(middle - packing.added, self.bits)
        if bool(wrong.any()):
            place, value = first_place(wrong, stored)
            raise DamagedSourceError(
                f"tensor {linear}.{packing.zeros} holds {int(value) & 0xFFFFFFFF:#010x} at "
                f"{place}, but {self.said} says {self.kind} without zero points, which are all "
                f"{middle} then: one of the two is wrong, or the version of the format"
            )
        return None

    def _group_of_each(self, linear: str, read: Read, inputs: int) -> Tensor:
        neighbours = torch.arange(inputs) // (self.group or inputs)
        stored = None if self.packing.groups is None else read.get(self.packing.groups)
        if stored is None or (not self.ordered and torch.equal(stored.long(), neighbours)):
            return neighbours
        name, groups = f"{linear}.{self.packing.groups}", self._groups(inputs)
        wrong = (stored < 0) | (stored >= groups) if self.ordered else stored != neighbours
        if bool(wrong.any()):
            place, value = first_place(wrong, stored)
            raise DamagedSourceError(
                f"tensor {name} holds {value} at {place}, but {self.said} says {self.kind}; the "
                f"source is damaged, download it again"
            )
        return stored.long()


def unpack_words(words: Tensor, bits: int, places: tuple[int, ...] | None) -> Tensor:
    """Integers that lie in words along the first axis.

    Args:
        words: int32 [W, C].
        bits: of an integer.
        places: which integer of a word, from the lowest bits, each neighbour is.

    Returns:
        int16 [W * 32 / bits, C], each from 0 to 2^bits - 1.
    """
    order = torch.tensor(places or range(WORD_BITS // bits), dtype=torch.int32)
    shifted = words[:, None] >> (order * bits)[:, None]
    return (shifted & (1 << bits) - 1).to(torch.int16).flatten(0, 1)


def _word_of(integer: int, bits: int) -> int:
    """The int32 whose integers are all the same."""
    word = sum(integer << shift for shift in range(0, WORD_BITS, bits))
    return word - (1 << WORD_BITS) if word >> (WORD_BITS - 1) else word
