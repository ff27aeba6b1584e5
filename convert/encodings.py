"""How a source holds the weights of its linears: the one seam between a source and a scheme.

An *encoding* is known from headers: which tensors a linear has in the source, and whose codes they
are. What has been read of them are `Weights`. A further kind of source is an encoding of its own
and nothing else; one whose codes no scheme has decodes them, piece by piece, to floats.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from qwen3_ascend.checkpoint.architecture import LM_HEAD
from qwen3_ascend.checkpoint.layout import ND, Layout
from qwen3_ascend.checkpoint.linear import Linear
from qwen3_ascend.checkpoint.schemes import W8A8, Scheme
from qwen3_ascend.checkpoint.schemes.pieces import Stack
from qwen3_ascend.convert import exchange
from qwen3_ascend.convert.weights import ChosenWeights, TakenWeights, Weights
from qwen3_ascend.errors import DamagedSourceError, SourceError
from qwen3_ascend.files.safetensors import NAMES, TensorSlot

HEAD = f"{LM_HEAD}.{exchange.WEIGHT}"

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""Types of weights, biases and scales that are read."""

TAKEN_BYTES = 8
"""Memory for each weight of a piece whose codes are taken: copies of a byte each, on their way
into the layout."""

Read = Mapping[str, Tensor]
"""The tensors of one linear of the source, by suffix."""


class Encoding(ABC):
    """How a source holds the weight of a linear; known from headers.

    Attributes:
        scheme: whose codes are there to be taken; None if they are to be chosen.
        known: suffixes of the tensors that there may be.
    """

    scheme: Scheme | None

    @property
    @abstractmethod
    def kind(self) -> str:
        """What it is, with all that decides how its tensors are read, in a few words."""

    @property
    @abstractmethod
    def known(self) -> tuple[str, ...]: ...

    @property
    def codes(self) -> Literal["chosen", "taken"]:
        """Where the codes of a linear come from, as the manifest says it."""
        return "chosen" if self.scheme is None else "taken"

    def under(self, scheme: Scheme | None) -> Encoding | None:
        """How the same tensors are read for a linear that is to be stored under a scheme, or (None)
        of which floats are wanted; None if that cannot be."""
        return self if self.scheme in (None, scheme) else None

    @abstractmethod
    def suffixes(
        self, linear: str, shape: tuple[int, int], slots: Mapping[str, TensorSlot]
    ) -> tuple[str, ...]:
        """The suffixes of the tensors of a linear [N, K] that make its weight.

        Raises:
            SourceError: if a tensor is missing, or its type or shape is not what is said.
        """

    def stored(self, linear: str, slots: Mapping[str, TensorSlot]) -> list[str]:
        """The tensors of a linear that are there, by full name."""
        return [name for suffix in self.known if (name := f"{linear}.{suffix}") in slots]

    @abstractmethod
    def weights(self, parts: Mapping[str, Read]) -> Weights:
        """What has been read of each linear, in the order in which they are fused.

        Raises:
            DamagedSourceError: if a value cannot be right.
        """

    @abstractmethod
    def temporary_bytes(self, scheme: Scheme, layout: Layout, itemsize: int) -> int:
        """Memory that packing takes for each weight; `itemsize` is that of the source."""


@dataclass(frozen=True)
class FloatEncoding(Encoding):
    """weight: bfloat16, float16 or float32 [N, K]."""

    scheme: None = None

    @property
    @override
    def kind(self) -> str:
        return "floats"

    @property
    @override
    def known(self) -> tuple[str, ...]:
        return (exchange.WEIGHT,)

    @override
    def suffixes(
        self, linear: str, shape: tuple[int, int], slots: Mapping[str, TensorSlot]
    ) -> tuple[str, ...]:
        check_floats(f"{linear}.{exchange.WEIGHT}", shape, slots)
        return (exchange.WEIGHT,)

    @override
    def weights(self, parts: Mapping[str, Read]) -> Weights:
        found = (read[exchange.WEIGHT] for read in parts.values())
        return ChosenWeights(Stack(tuple(w.view(-1, w.shape[-1]) for w in found)))

    @override
    def temporary_bytes(self, scheme: Scheme, layout: Layout, itemsize: int) -> int:
        return scheme.temporary_bytes(layout, itemsize)


@dataclass(frozen=True)
class Int8Encoding(Encoding):
    """weight: int8 [N, K]; weight_scale: a float for each output, [N, 1] or [N].

    The scales are kept as they are, in float32, whether or not bfloat16 has them.

    Attributes:
        said: the place of the source that says so, for errors.
        offset: suffix of offsets that may be there, and must be zero.
    """

    said: str
    offset: str
    scheme: Scheme = W8A8()

    @property
    @override
    def kind(self) -> str:
        return str(self.scheme)

    @property
    @override
    def known(self) -> tuple[str, ...]:
        return (exchange.WEIGHT, exchange.WEIGHT_SCALE, self.offset)

    @override
    def suffixes(
        self, linear: str, shape: tuple[int, int], slots: Mapping[str, TensorSlot]
    ) -> tuple[str, ...]:
        said = f"{self.said} says int8 with a scale for each output"
        check_coded(f"{linear}.{exchange.WEIGHT}", [torch.int8], [shape], slots, said)
        for_each_output = [(shape[0], 1), (shape[0],)]
        check_coded(f"{linear}.{exchange.WEIGHT_SCALE}", FLOATS, for_each_output, slots, said)
        if f"{linear}.{self.offset}" not in slots:
            return self.known[:-1]
        types = (*FLOATS, torch.int8)
        check_coded(f"{linear}.{self.offset}", types, for_each_output, slots, said)
        return self.known

    @override
    def weights(self, parts: Mapping[str, Read]) -> Weights:
        for linear, read in parts.items():
            require_finite_scales(f"{linear}.{exchange.WEIGHT_SCALE}", read[exchange.WEIGHT_SCALE])
            if self.offset in read:
                _require_zeros(f"{linear}.{self.offset}", read[self.offset])
        return TakenWeights(tuple(self._linear(read) for read in parts.values()))

    @override
    def temporary_bytes(self, scheme: Scheme, layout: Layout, itemsize: int) -> int:
        return TAKEN_BYTES

    def _linear(self, read: Read) -> Linear:
        shape = tuple(read[exchange.WEIGHT].shape)
        return Linear(self.scheme, shape, ND, self.scheme.pack(exchange.int8_codes(read), ND))


FLOAT = FloatEncoding()
"""The encoding of every linear of a source that is not quantized."""


def read_weights(
    encoding: Encoding, parts: Collection[str], tensors: Mapping[str, Tensor]
) -> Weights:
    """The weights of linears, in the order in which they are fused.

    Args:
        encoding: how the source holds them.
        parts: their names in the source; also of a plain tensor, which is a matrix like any other.
        tensors: what has been read of them, by full name.

    Raises:
        DamagedSourceError: if a value cannot be right.
    """
    reads: dict[str, dict[str, Tensor]] = {part: {} for part in parts}
    for name, tensor in tensors.items():
        part, _, suffix = name.rpartition(".")
        reads[part][suffix] = tensor
    return encoding.weights(reads)


def read_matrices(
    encoding: Encoding, matrices: Sequence[Sequence[str]], tensors: Mapping[str, Tensor]
) -> list[Weights]:
    """The weights of each matrix of a linear, of the tensors that `read_weights` takes.

    Args:
        encoding: how the source holds them.
        matrices: the names of the linears that each is fused of.
        tensors: what has been read of all of them, matrix by matrix, as many of each.
    """
    names, each = iter(tensors), len(tensors) // len(matrices)
    return [
        read_weights(
            encoding, parts, {name: tensors[name] for name in itertools.islice(names, each)}
        )
        for parts in matrices
    ]


def check_floats(name: str, shape: tuple[int, ...], slots: Mapping[str, TensorSlot]) -> None:
    """SourceError unless the source has a float tensor of a name and shape."""
    slot = slots.get(name)
    if slot is None:
        untied = ", and config.json does not tie it to the embedding" if name == HEAD else ""
        raise SourceError(f"the source has no tensor {name}{untied}")
    if slot.dtype not in FLOATS:
        known = ", ".join(NAMES[dtype] for dtype in FLOATS)
        raise SourceError(
            f"tensor {name} is {NAMES[slot.dtype]}; only {known} can be converted: "
            + _type_advice(slot.dtype)
        )
    if slot.shape != shape:
        raise SourceError(
            f"tensor {name} is {list(slot.shape)}, but config.json asks for {list(shape)}"
        )


def check_coded(
    name: str,
    types: Collection[torch.dtype],
    shapes: Sequence[tuple[int, ...]],
    slots: Mapping[str, TensorSlot],
    said: str,
) -> None:
    """SourceError unless the source has a tensor of one of these types and shapes; `said` is what
    its configuration says, and where."""
    slot = slots.get(name)
    if slot is None:
        raise SourceError(f"the source has no tensor {name}, but {said}")
    if slot.dtype not in types or slot.shape not in shapes:
        wanted = " or ".join(NAMES[dtype] for dtype in types)
        raise SourceError(
            f"tensor {name} is {NAMES[slot.dtype]} {list(slot.shape)} and not {wanted} "
            f"{list(shapes[0])}, but {said}"
        )


def _type_advice(dtype: torch.dtype) -> str:
    if dtype == torch.float64:
        return "save the model as bfloat16 first (model.to(torch.bfloat16).save_pretrained(FOLDER))"
    return "use the original, unquantized model"


def require_finite_scales(name: str, scales: Tensor) -> None:
    """DamagedSourceError naming the first scale that is no number."""
    finite = torch.isfinite(scales)
    if not bool(finite.all()):
        place, value = first_place(~finite, scales)
        raise DamagedSourceError(
            f"tensor {name} holds {value} at {place}; the source is damaged, download it again"
        )


def require_scales(name: str, scales: Tensor, largest_code: float, signed: bool = False) -> None:
    """DamagedSourceError naming the first scale that no tool writes.

    Args:
        name: of the tensor.
        scales: floats of any shape.
        largest_code: the largest magnitude that is multiplied by them.
        signed: whether they may be negative.
    """
    require_finite_scales(name, scales)
    most = torch.finfo(torch.bfloat16).max / largest_code
    wrong = (scales == 0 if signed else scales <= 0) | (scales.float().abs() > most)
    if bool(wrong.any()):
        place, value = first_place(wrong, scales)
        why = "weights are beyond bfloat16 with it" if abs(value) > most else "no scale is that"
        raise DamagedSourceError(
            f"tensor {name} holds {value} at {place}, but {why}; the source is damaged, download "
            f"it again"
        )


def _require_zeros(name: str, offsets: Tensor) -> None:
    if bool(offsets.any()):
        place, value = first_place(offsets != 0, offsets)
        raise DamagedSourceError(
            f"tensor {name} holds {value} at {place}: the weights are asymmetric, for which there "
            f"is no scheme yet; quantize with symmetric weights, or convert the original model"
        )


def first_place(mask: Tensor, values: Tensor) -> tuple[list[int], float]:
    """Where a mask is first true, and the value there."""
    place = mask.nonzero()[0].tolist()
    return place, values[tuple(place)].item()
