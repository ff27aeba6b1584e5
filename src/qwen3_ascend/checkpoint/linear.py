"""A stored linear: a scheme's tensors, and what can be done with them whatever the scheme."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3_ascend import native
from qwen3_ascend.checkpoint.layout import Cut, Layout, Place
from qwen3_ascend.checkpoint.schemes.base import Codes, InputRange, Scheme
from qwen3_ascend.checkpoint.schemes.pieces import Piece, Stack
from qwen3_ascend.errors import CheckpointError
from qwen3_ascend.files.safetensors import Form

BIAS = "bias"
"""Suffix of the optional bias, bfloat16 [*batch, N], which no scheme changes."""

Span = tuple[int, int]
"""Where a range of outputs or inputs begins, and its length."""


@dataclass(frozen=True, eq=False)
class Linear:
    """One linear, packed: what is on disk is what is in memory.

    Attributes:
        scheme: what the tensors mean.
        shape: logical [*batch, N, K].
        layout: of the stored weight.
        tensors: the stored tensors by suffix, those of the scheme and perhaps a bias.
    """

    scheme: Scheme
    shape: tuple[int, ...]
    layout: Layout
    tensors: Mapping[str, Tensor]

    @property
    def weight(self) -> Tensor:
        """The weight in storage shape."""
        return self.tensors["weight"]

    @property
    def bias(self) -> Tensor | None:
        """The bias, bfloat16 [*batch, N], if there is one."""
        return self.tensors.get(BIAS)

    def codes(self) -> Codes:
        """The stored tensors in plain order."""
        return self.scheme.unpack(self.tensors, self.shape, self.layout)

    def dequantize(self) -> Tensor:
        """The weight that the bytes stand for, float32 [*batch, N, K]."""
        return self.scheme.decode(self.codes())

    def reference(self, x: Tensor) -> Tensor:
        """The product as defined: float x [T, K] to float32 [T, N], slow and exact."""
        product = self.scheme.product(self.codes(), x)
        return product if self.bias is None else product + self.bias.float()

    def places(self) -> dict[str, dict[Cut, Place]]:
        """Where outputs and inputs lie in each stored tensor; see Scheme.places."""
        return {**self.scheme.places(self.layout), BIAS: {"outputs": Place(-1, 1)}}

    def narrow(self, cut: Cut, spans: Sequence[Span]) -> Linear:
        """The linear of some outputs, or of some inputs, without unpacking anything.

        Args:
            cut: along which axis.
            spans: the ranges that are kept, in order.

        Returns:
            A linear whose tensors are views of these if there is one span, else copies.

        Raises:
            CheckpointError: if a span begins or ends within a block of the layout.
        """
        axis = len(self.shape) - (2 if cut == "outputs" else 1)
        length = self.shape[axis]
        shape = list(self.shape)
        shape[axis] = sum(count for _, count in spans)
        places = self.places()
        tensors: Mapping[str, Tensor] = {
            suffix: _narrow(suffix, tensor, places[suffix].get(cut), spans, length)
            for suffix, tensor in self.tensors.items()
        }
        if cut == "inputs":
            tensors = self.scheme.of_some_inputs(tensors, shape, self.layout)
        return Linear(self.scheme, tuple(shape), self.layout, tensors)

    def of_experts(self, first: int, count: int) -> Linear:
        """The linears of some experts of [experts, N, K]: views, each one range of bytes.

        Raises:
            CheckpointError: if there are no such experts.
        """
        experts, *matrix = self.shape
        if len(matrix) != 2 or not 0 <= first < first + count <= experts:
            raise CheckpointError(
                f"a linear {list(self.shape)} has no experts {first} to {first + count - 1}"
            )
        tensors = {suffix: tensor[first : first + count] for suffix, tensor in self.tensors.items()}
        return Linear(self.scheme, (count, *matrix), self.layout, tensors)

    def divide_outputs(self, most: int) -> tuple[Linear, ...]:
        """The linear in as few parts of at most `most` outputs each (or one block of the layout, if
        that holds more) as there can be, of about the same size, none of which begins within a
        block; their tensors are views."""
        outputs, places = self.shape[-2], self.places()
        divided = (places[suffix].get("outputs") for suffix in self.tensors)
        unit = math.lcm(*(place.unit for place in divided if place))
        units = -(-outputs // unit)
        count = -(-units // max(1, most // unit))
        borders = [min(unit * (units * part // count), outputs) for part in range(count + 1)]
        return tuple(
            self.narrow("outputs", [(start, stop - start)])
            for start, stop in itertools.pairwise(borders)
        )

    def for_inputs(self, inputs: InputRange) -> Linear:
        """The linear for inputs of a range; itself if its scheme does not fix that beforehand."""
        tensors = self.scheme.for_inputs(self.tensors, self.shape, self.layout, inputs)
        return Linear(self.scheme, self.shape, self.layout, tensors)

    def pad_outputs(self, outputs: int) -> Linear:
        """The linear with outputs of zero behind its own, up to so many; itself if it has them."""
        if outputs == self.shape[-2]:
            return self
        places = self.places()
        tensors = {
            suffix: _pad(tensor, places[suffix].get("outputs"), outputs)
            for suffix, tensor in self.tensors.items()
        }
        shape = (*self.shape[:-2], outputs, self.shape[-1])
        return Linear(self.scheme, shape, self.layout, tensors)

    def piece(self, piece: Piece) -> Linear:
        """One piece as a linear [N, K] of its own; its tensors are views of these."""
        return self.matrix(piece.matrix).narrow(
            piece.axis, [(piece.start, piece.stop - piece.start)]
        )

    def matrix(self, index: int) -> Linear:
        """One matrix of a linear with batch axes, counted in storage order."""
        batch = self.shape[:-2]
        if not batch:
            return self
        tensors = {
            suffix: tensor.flatten(0, len(batch) - 1)[index]
            for suffix, tensor in self.tensors.items()
        }
        return Linear(self.scheme, self.shape[-2:], self.layout, tensors)


def stored_forms(
    scheme: Scheme, shape: Sequence[int], layout: Layout, bias: bool
) -> dict[str, Form]:
    """The stored tensors of a linear, by suffix."""
    forms = scheme.forms(shape, layout)
    return {**forms, BIAS: Form(torch.bfloat16, tuple(shape[:-1]))} if bias else forms


def stored_bias(bias: Tensor) -> Tensor:
    """A bias as it is stored."""
    return bias.to(torch.bfloat16)


def quantize(scheme: Scheme, weight: Tensor, bias: Tensor | None, layout: Layout) -> Linear:
    """Quantizes and packs a whole float weight [*batch, N, K], which must be finite."""
    shape, kernels = tuple(weight.shape), native.best()
    forms = scheme.forms(shape, layout)
    tensors = {suffix: torch.empty(form.shape, dtype=form.dtype) for suffix, form in forms.items()}
    linear = Linear(scheme, shape, layout, tensors)
    matrices = weight.reshape(-1, *shape[-2:])
    for piece in scheme.pieces(shape, layout):
        packed = scheme.pack_piece(Stack((matrices[piece.matrix],)), piece, layout, kernels)
        for suffix, place in linear.piece(piece).tensors.items():
            place.copy_(packed.tensors[suffix])
    if bias is None:
        return linear
    return Linear(scheme, shape, layout, {**tensors, BIAS: stored_bias(bias)})


def byte_offset(form: Form, place: Place, piece: Piece, batch: int = 0) -> int | None:
    """The byte at which a piece begins in a stored tensor.

    Args:
        form: of the whole tensor.
        place: of the piece's axis in it.
        piece: which one.
        batch: number of batch axes, which come first.

    Returns:
        None if the piece is not one contiguous range there.
    """
    axis = len(form.shape) + place.axis
    if math.prod(form.shape[batch:axis]) != 1:
        return None
    matrix = math.prod(form.shape[batch:])
    step = math.prod(form.shape[axis + 1 :])
    elements = piece.matrix * matrix + piece.start // place.unit * step
    return elements * form.dtype.itemsize


def _pad(tensor: Tensor, place: Place | None, length: int) -> Tensor:
    if place is None:
        return tensor
    shape = list(tensor.shape)
    shape[place.axis] = -(-length // place.unit)
    padded = tensor.new_zeros(shape)
    padded.narrow(place.axis, 0, tensor.shape[place.axis]).copy_(tensor)
    return padded


def _narrow(
    suffix: str, tensor: Tensor, place: Place | None, spans: Sequence[Span], length: int
) -> Tensor:
    if place is None:
        return tensor
    unit = place.unit
    parts = []
    for start, count in spans:
        stop = start + count
        if start % unit or (stop % unit and stop != length):
            raise CheckpointError(
                f"a cut at {start}+{count} falls inside a block of {unit} of the {suffix}; "
                f"choose fewer ranks"
            )
        first = start // unit
        parts.append(tensor.narrow(place.axis, first, -(-stop // unit) - first))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=place.axis)
