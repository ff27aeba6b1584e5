"""One item of the plan at work: read, packed, written and hashed piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3_ascend.checkpoint.layout import ND, Place
from qwen3_ascend.checkpoint.linear import BIAS, byte_offset, stored_bias, stored_forms
from qwen3_ascend.checkpoint.schemes import BF16
from qwen3_ascend.checkpoint.schemes.pieces import Packed, Piece, Stack, Sums, sqnr_db
from qwen3_ascend.convert.output.journal import Done
from qwen3_ascend.convert.output.weight_file import WeightFileWriter, tensor_bytes
from qwen3_ascend.convert.plan import Item
from qwen3_ascend.convert.source import Source
from qwen3_ascend.errors import DamagedSourceError
from qwen3_ascend.files.hashing import Job
from qwen3_ascend.native import Kernels, NotFinite
from qwen3_ascend.native.sha256 import Digests, Stream

ROWS_AT_A_TIME = 256
"""Rows looked at together: keeps temporaries within the cache's reach."""


@dataclass(frozen=True)
class Task:
    """An item with its source tensors.

    Attributes:
        item: what is to be made.
        reads: name and values of each source tensor.
        weight: the values of the weight's parts.
        biases: those of the bias's parts.
        pieces: how the weight is divided.
    """

    item: Item
    reads: tuple[tuple[str, Tensor], ...]
    weight: Stack
    biases: tuple[Tensor, ...]
    pieces: tuple[Piece, ...]

    @property
    def is_verbatim(self) -> bool:
        """Whether what is stored is, byte by byte, the one source tensor."""
        item = self.item
        plain = item.scheme == BF16() and item.layout == ND
        return plain and len(self.reads) == 1 and self.reads[0][1].dtype == torch.bfloat16

    def pack(self, index: int, kernels: Kernels) -> Packed:
        """Piece `index`; a bias comes with the first.

        Raises:
            DamagedSourceError: naming the first value that cannot be stored.
        """
        item = self.item
        try:
            packed = item.scheme.pack_piece(self.weight, self.pieces[index], item.layout, kernels)
            if not self.biases or index:
                return packed
            bias = stored_bias(torch.cat(self.biases))
            kernels.check_finite(bias[None])
            return Packed({**packed.tensors, BIAS: bias}, packed.sums)
        except NotFinite:
            for name, tensor in self.reads:
                require_finite(name, tensor)
            raise


def make_task(item: Item, source: Source) -> Task:
    """Reads an item's source tensors, which waits for their files."""
    reads = tuple((name, source.read(name)) for name in item.reads)
    values = [tensor for _, tensor in reads]
    count = len(item.weights)
    weight = Stack(tuple(tensor.view(-1, tensor.shape[-1]) for tensor in values[:count]))
    return Task(item, reads, weight, tuple(values[count:]), item.pieces)


class _Output:
    """The stored tensors of an item on their way to the file."""

    def __init__(self, item: Item, file: WeightFileWriter) -> None:
        self._item, self._file = item, file
        self._forms = stored_forms(item.scheme, item.matrix, item.layout, bool(item.biases))
        self._places = item.scheme.places(item.layout)
        self._gathered: dict[str, Tensor] = {}

    def put(self, piece: Piece, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, memoryview]]:
        """Writes what a piece has become; yields each name with the bytes, in the tensor's order.

        A tensor in which a piece is not one range (such as scales for groups of inputs, when the
        pieces are outputs) is kept until it is whole; such tensors are small.
        """
        for suffix, tensor in tensors.items():
            place = self._places.get(suffix, {}).get(piece.axis)
            offset = byte_offset(self._forms[suffix], place, piece) if place else 0
            if offset is not None:
                yield self._write(suffix, offset, tensor)
            elif place is not None:
                self._gather(suffix, place, piece, tensor)

    def finish(self) -> Iterator[tuple[str, memoryview]]:
        """Writes what was kept."""
        for suffix, tensor in self._gathered.items():
            yield self._write(suffix, 0, tensor)

    def _write(self, suffix: str, offset: int, tensor: Tensor) -> tuple[str, memoryview]:
        name, data = self._item.stored_name(suffix), tensor_bytes(tensor)
        self._file.write(name, offset, data)
        return name, data

    def _gather(self, suffix: str, place: Place, piece: Piece, tensor: Tensor) -> None:
        if suffix not in self._gathered:
            form = self._forms[suffix]
            self._gathered[suffix] = torch.empty(form.shape, dtype=form.dtype)
        start, length = piece.start // place.unit, tensor.shape[place.axis]
        self._gathered[suffix].narrow(place.axis, start, length).copy_(tensor)


def convert(
    task: Task,
    file: WeightFileWriter,
    kernels: Kernels,
    way: Digests,
    hash_source: bool,
    finished: Callable[[Done], None],
) -> Job:
    """Packs and writes an item piece by piece, and has what was written, and read, hashed.

    Raises:
        CheckpointError: if the source is damaged or the disk refuses.
    """
    item, output = task.item, _Output(task.item, file)
    stored = {name: way.start() for name in item.forms}
    origin = _Origin(task, way) if hash_source and not task.is_verbatim else None
    sums: list[Sums] = []
    for index, piece in enumerate(task.pieces):
        packed = task.pack(index, kernels)
        streams = [(stored[name], data) for name, data in output.put(piece, packed.tensors)]
        yield [*streams, *origin.advance(piece)] if origin else streams
        if packed.sums is not None:
            sums.append(packed.sums)
    yield [(stored[name], data) for name, data in output.finish()]
    hashes = {name: digest.hexdigest() for name, digest in stored.items()}
    source = origin.hashes() if origin else {}
    if hash_source and task.is_verbatim:
        source = dict(zip((name for name, _ in task.reads), hashes.values(), strict=True))
    finished(Done(task.item.name, hashes, source, sqnr_db(sums)))


class _Origin:
    """The source bytes of a task, hashed in file order while the pieces bring them into memory."""

    def __init__(self, task: Task, way: Digests) -> None:
        self._task = task
        self._digests = {name: way.start() for name, _ in task.reads}
        self._data = [(name, tensor_bytes(tensor)) for name, tensor in task.reads]
        self._at = 0

    def advance(self, piece: Piece) -> Iterator[Stream]:
        """The bytes that come next, about as many as this piece was made of."""
        weights = sum(tensor.nbytes for tensor in self._task.weight.parts)
        length = self._task.pieces[-1].stop
        stop = weights * piece.stop // length
        if piece.stop == length:
            stop = sum(data.nbytes for _, data in self._data)  # the biases as well
        start, self._at = self._at, stop
        for name, data in self._data:
            if start < data.nbytes and stop > 0:
                yield self._digests[name], data[max(start, 0) : stop]
            start, stop = start - data.nbytes, stop - data.nbytes

    def hashes(self) -> dict[str, str]:
        """SHA-256 of each source tensor."""
        return {name: digest.hexdigest() for name, digest in self._digests.items()}


def require_finite(name: str, tensor: Tensor) -> None:
    """DamagedSourceError naming the first NaN, infinity, or number beyond bfloat16."""
    for start in range(0, tensor.shape[0], ROWS_AT_A_TIME):
        finite = torch.isfinite(tensor[start : start + ROWS_AT_A_TIME].to(torch.bfloat16))
        if not bool(finite.all()):
            first = (~finite).nonzero()[0].tolist()
            first[0] += start
            raise DamagedSourceError(
                f"tensor {name} holds {tensor[tuple(first)].item()} at {first}; "
                f"the source is damaged, download it again"
            )
