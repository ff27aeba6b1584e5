"""One item of the plan at work: read, packed, written and hashed piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3_ascend.checkpoint.layout import ND, Layout
from qwen3_ascend.checkpoint.schemes import BF16, SCHEMES, Linear
from qwen3_ascend.checkpoint.schemes.base import row_slices, store_bias
from qwen3_ascend.checkpoint.schemes.pieces import (
    Packed,
    Piece,
    Stack,
    Sums,
    sqnr_db,
)
from qwen3_ascend.convert.output.journal import Done
from qwen3_ascend.convert.output.weight_file import WeightFileWriter, tensor_bytes
from qwen3_ascend.convert.plan import PLAIN_DTYPE, LinearPlan, TensorPlan
from qwen3_ascend.convert.source import Source
from qwen3_ascend.errors import DamagedSourceError
from qwen3_ascend.files.hashing import Job
from qwen3_ascend.native import Kernels, NotFinite
from qwen3_ascend.native.sha256 import Digests, Stream


@dataclass(frozen=True)
class Task:
    """An item with its source tensors, cut into pieces.

    A plain tensor is a bfloat16 matrix in row-major order like any other.

    Attributes:
        name: of the item.
        names: of its stored tensors, by suffix.
        reads: name and values of each source tensor.
        weight, biases: the same values as the scheme takes them.
        layout: of the weight.
    """

    name: str
    names: dict[str, str]
    reads: tuple[tuple[str, Tensor], ...]
    weight: Stack
    biases: tuple[Tensor, ...]
    scheme: type[Linear]
    layout: Layout
    pieces: tuple[Piece, ...]

    @property
    def is_verbatim(self) -> bool:
        """Whether what is stored is, byte by byte, the one source tensor."""
        plain = self.scheme is BF16 and self.layout == ND
        return plain and len(self.reads) == 1 and self.reads[0][1].dtype == PLAIN_DTYPE

    def pack(self, index: int, kernels: Kernels) -> Packed:
        """Piece `index`, its tensors by full name; a bias comes with the first.

        Raises:
            DamagedSourceError: naming the first value that cannot be stored.
        """
        try:
            packed = self.scheme.pack(self.weight, self.pieces[index], self.layout, kernels)
            tensors = {self.names[suffix]: place for suffix, place in packed.tensors.items()}
            bias = store_bias(torch.cat(self.biases)) if self.biases and index == 0 else None
            if bias is not None:
                kernels.check_finite(bias[None])
                tensors[self.names["bias"]] = (0, bias)
        except NotFinite:
            for name, tensor in self.reads:
                require_finite(name, tensor)
            raise
        return Packed(tensors, packed.sums)


def make_task(item: LinearPlan | TensorPlan, source: Source) -> Task:
    """Reads an item's source tensors, which waits for their files."""
    reads = tuple((name, source.read(name)) for name in item.reads)
    values = [tensor for _, tensor in reads]
    if isinstance(item, TensorPlan):
        matrix = values[0] if values[0].dim() == 2 else values[0][None]
        weight, pieces = Stack((matrix,)), BF16.pieces((matrix.shape[0], matrix.shape[1]), ND)
        return Task(item.name, {"weight": item.name}, reads, weight, (), BF16, ND, pieces)
    count = len(item.spec.sources)
    scheme = SCHEMES[item.scheme]
    return Task(
        name=item.name,
        names={suffix: f"{item.name}.{suffix}" for suffix in item.stored},
        reads=reads,
        weight=Stack(tuple(values[:count])),
        biases=tuple(values[count:]),
        scheme=scheme,
        layout=item.layout,
        pieces=scheme.pieces((item.spec.outputs, item.spec.inputs), item.layout),
    )


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
    stored = {name: way.start() for name in task.names.values()}
    origin = _Origin(task, way) if hash_source and not task.is_verbatim else None
    sums: list[Sums] = []
    for index, piece in enumerate(task.pieces):
        packed = task.pack(index, kernels)
        streams: list[Stream] = []
        for name, (offset, tensor) in packed.tensors.items():
            data = tensor_bytes(tensor)
            file.write(name, offset, data)
            streams.append((stored[name], data))
        yield [*streams, *origin.advance(piece)] if origin else streams
        if packed.sums is not None:
            sums.append(packed.sums)
    hashes = {name: digest.hexdigest() for name, digest in stored.items()}
    source = origin.hashes() if origin else {}
    if hash_source and task.is_verbatim:
        source = dict(zip((name for name, _ in task.reads), hashes.values(), strict=True))
    finished(Done(task.name, hashes, source, sqnr_db(sums)))


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
    for rows in row_slices(tensor.shape[0]):
        finite = torch.isfinite(tensor[rows].to(PLAIN_DTYPE))
        if not bool(finite.all()):
            first = (~finite).nonzero()[0].tolist()
            first[0] += rows.start
            raise DamagedSourceError(
                f"tensor {name} holds {tensor[tuple(first)].item()} at {first}; "
                f"the source is damaged, download it again"
            )
