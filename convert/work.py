"""One item of the plan at work: packed piece by piece, written at once, hashed in file order."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3_ascend.checkpoint.errors import DamagedSourceError
from qwen3_ascend.checkpoint.journal import Done
from qwen3_ascend.checkpoint.layout import ND, Layout
from qwen3_ascend.checkpoint.schemes import BF16, SCHEMES, Linear
from qwen3_ascend.checkpoint.schemes.base import row_slices, store_bias
from qwen3_ascend.checkpoint.schemes.pieces import Packed, Piece, Stack, Sums, sqnr_db
from qwen3_ascend.checkpoint.shard_writer import ShardWriter, tensor_bytes
from qwen3_ascend.convert.plan import PLAIN_DTYPE, LinearPlan, TensorPlan
from qwen3_ascend.convert.source import Source
from qwen3_ascend.native import Kernels, NotFinite


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


class Assembly:
    """The pieces of one task on their way into a shard; every method may run in any thread.

    The hash of a tensor needs its bytes in order, but nobody waits for his turn: who finishes a
    piece leaves it for the thread that is hashing, or, if there is none, hashes what lies ready.
    """

    def __init__(
        self, task: Task, shard: ShardWriter, kernels: Kernels, finished: Callable[[Done], None]
    ) -> None:
        self._task, self._shard, self._kernels, self._finished = task, shard, kernels, finished
        self._digests = {name: hashlib.sha256() for name in task.names.values()}
        self._sums: list[Sums] = []
        self._ready: dict[int, Packed] = {}
        self._next, self._hashing = 0, False
        self._lock = threading.Lock()

    def process(self, index: int) -> int:
        """Packs, writes and, when it is its turn, hashes a piece; returns how many were hashed."""
        packed = self._task.pack(index, self._kernels)
        for name, (offset, tensor) in packed.tensors.items():
            self._shard.write(name, offset, tensor_bytes(tensor))
        with self._lock:
            self._ready[index] = packed
            if self._hashing:
                return 0
            self._hashing = True
        return self._hash_ready()

    def _hash_ready(self) -> int:
        count = 0
        while (packed := self._take()) is not None:
            for name, (_, tensor) in packed.tensors.items():
                self._digests[name].update(tensor_bytes(tensor))
            if packed.sums is not None:
                self._sums.append(packed.sums)
            count += 1
            if self._next == len(self._task.pieces):
                self._finish()
        return count

    def _take(self) -> Packed | None:
        """The next piece in order, if it is there; else nobody is hashing any more."""
        with self._lock:
            packed = self._ready.pop(self._next, None)
            self._hashing = packed is not None
            self._next += self._hashing
            return packed

    def _finish(self) -> None:
        hashes = {name: digest.hexdigest() for name, digest in self._digests.items()}
        self._finished(Done(self._task.name, hashes, sqnr_db(self._sums)))


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
