"""One item of the plan at work: read, packed, written and hashed piece by piece."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from blake3 import blake3
from torch import Tensor

from qwen3_ascend.checkpoint.layout import ND, Place
from qwen3_ascend.checkpoint.linear import BIAS, byte_offset, stored_bias, stored_forms
from qwen3_ascend.checkpoint.schemes import BF16, Input, InputRange
from qwen3_ascend.checkpoint.schemes.grid import IntegerScheme
from qwen3_ascend.checkpoint.schemes.pieces import Packed, Piece, Sums, sqnr_db
from qwen3_ascend.convert.encodings import FLOAT, read_matrices, read_weights
from qwen3_ascend.convert.exchange import WEIGHT
from qwen3_ascend.convert.output.journal import Done
from qwen3_ascend.convert.output.weight_file import WeightFileWriter, tensor_bytes
from qwen3_ascend.convert.plan import Item
from qwen3_ascend.convert.quantizers import QUANTIZERS, Choose, Mse, Needs, UselessStatistics
from qwen3_ascend.convert.recipe import NEAREST
from qwen3_ascend.convert.source import Source
from qwen3_ascend.convert.statistics import InputStatistics, Seen, are_finite
from qwen3_ascend.convert.transforms.changes import FindChanges
from qwen3_ascend.convert.transforms.whole import ModelChanges
from qwen3_ascend.convert.weights import Choosing, Weights, in_one
from qwen3_ascend.errors import DamagedSourceError, SourceError
from qwen3_ascend.files.threads import Crew
from qwen3_ascend.native import Kernels, NotFinite

ROWS_AT_A_TIME = 256
"""Rows looked at together: keeps temporaries within the cache's reach."""

FindStatistics = Callable[[], Seen | None]
"""Gives what was seen of a linear's inputs to who asks, and keeps nothing of it."""


def no_statistics() -> None:
    """Of a linear that nothing was recorded of."""


@dataclass(frozen=True)
class Task:
    """An item with its source tensors.

    Attributes:
        item: what is to be made.
        reads: name and values of each source tensor.
        weights: those of its weight.
        biases: those of the bias's parts.
        pieces: how the weight is divided.
        changes: gives what transforms do to each part; None if they leave the item as it is.
        statistics: gives those of the linear's inputs, once; None if there was no calibration.
        range: of the linear's inputs; None until `quantized` has found it.
        unreached: experts that no token of the calibration was given to; known as the range is.
        consults: name and values of further source tensors, which decide the changes.
    """

    item: Item
    reads: tuple[tuple[str, Tensor], ...]
    weights: Weights
    biases: tuple[Tensor, ...]
    pieces: tuple[Piece, ...]
    changes: FindChanges | None = None
    statistics: FindStatistics = no_statistics
    range: InputRange | None = None
    unreached: tuple[int, ...] = ()
    consults: tuple[tuple[str, Tensor], ...] = ()

    @property
    def is_verbatim(self) -> bool:
        """Whether what is stored is, byte by byte, the one source tensor."""
        item = self.item
        plain = item.scheme == BF16() and item.layout == ND and not item.block
        return plain and len(self.reads) == 1 and self.reads[0][1].dtype == torch.bfloat16

    def pack(self, index: int, kernels: Kernels) -> Packed:
        """Piece `index`; a bias comes with the first.

        Raises:
            DamagedSourceError: naming the first value that cannot be stored.
        """
        with self._naming_values():
            packed = self._pack_weight(self.pieces[index], kernels)
            if not self.biases or index:
                return packed
            bias = stored_bias(torch.cat([*changed_biases(self.biases, self.changes, kernels)]))
            kernels.check_finite(bias[None])
            return Packed({**packed.tensors, BIAS: bias}, packed.sums)

    def _pack_weight(self, piece: Piece, kernels: Kernels) -> Packed:
        """A piece of the weight, for inputs of the range that calibration has found."""
        item = self.item
        packed = self.weights.pack_piece(item.scheme, piece, item.layout, kernels)
        if item.scheme.input is not Input.INT8_STATIC or item.encoding.codes == "taken":
            return packed
        assert self.range is not None, "the plan has seen to it that there is calibration"
        shape = piece.shape(item.matrix)
        tensors = item.scheme.for_inputs(packed.tensors, shape, item.layout, self.range)
        return Packed(tensors, packed.sums)

    def quantized(self, kernels: Kernels, crew: Crew, advance: Callable[[], None]) -> Task:
        """The task with what calibration tells, and with the codes of its whole weight if its
        quantizer chooses them together.

        Args:
            kernels: to choose with.
            crew: for the experts of a linear.
            advance: called before each chunk; it may raise to end the work.

        Raises:
            DamagedSourceError: naming the first value that cannot be stored.
            SourceError: if nothing can be made of the statistics of the linear's inputs.
        """
        seen = self.statistics()
        known = self if seen is None else self._calibrated(seen)
        if self.item.quantizer == NEAREST:
            return known
        matrices = [*(seen or (None,) * len(self.item.matrices))]
        del seen  # large, and let go one by one

        def prepare(number: int) -> Choose:
            statistics, matrices[number] = matrices[number], None
            return known._prepared(statistics, kernels)

        choosing = Choosing(prepare, kernels, advance, crew)
        with self._naming_values():
            return replace(known, weights=self.weights.quantized(choosing))

    def _calibrated(self, seen: Seen) -> Task:
        """With what is known of the inputs. All experts have ranges of their own, and no scheme of
        theirs asks for any."""
        first = seen[0] if len(seen) == 1 else None
        unreached = tuple(number for number, known in enumerate(seen) if known is None)
        return replace(self, range=None if first is None else first.range, unreached=unreached)

    def _prepared(self, statistics: InputStatistics | None, kernels: Kernels) -> Choose:
        """For the inputs of a matrix; of an expert that nothing has reached the scales of least
        error are taken, which need no data."""
        item, quantizer = self.item, QUANTIZERS[self.item.quantizer]
        assert isinstance(item.scheme, IntegerScheme)
        if statistics is None and quantizer.needs > Needs.NOTHING:
            assert self.unreached, "the plan has seen to it that there is calibration"
            quantizer = Mse()
        try:
            return quantizer.prepare(item.scheme.grid, statistics, kernels)
        except UselessStatistics as error:
            raise SourceError(
                f"{item.name}: {error}; is the model finite on the calibration data?"
            ) from error

    @contextmanager
    def _naming_values(self) -> Iterator[None]:
        """Turns a weight that is not finite into an error that names its tensor and place."""
        item = self.item
        try:
            yield
        except NotFinite:
            for name, tensor in (*self.reads, *self.consults):
                require_finite(name, tensor)
            if self.changes is None:
                raise
            raise DamagedSourceError(
                f"the transforms of the recipe make weights of {item.name} that are beyond "
                f"bfloat16: convert with a recipe without transforms"
            ) from None


def make_task(
    item: Item,
    source: Source,
    changes: ModelChanges,
    statistics: FindStatistics = no_statistics,
) -> Task:
    """Reads an item's source tensors, which waits for their files.

    Args:
        item: what is to be made.
        source: of the model.
        changes: what transforms do to the model.
        statistics: see Task.

    Raises:
        DamagedSourceError: if a small tensor of the weight holds what cannot be right.
    """
    consults = tuple((name, source.read(name)) for name in item.consults)
    values = {name: source.read(name) for name in item.reads}
    stored = {name: values[name] for name in item.weights}
    matrices = read_matrices(item.encoding, item.matrices, stored)
    biases = tuple(values[name] for name in item.biases)
    finds: list[FindChanges | None] = [None] * len(matrices)
    if item.block:
        finds = [partial(changes.of, names, partial(floats_of, source)) for names in item.changed]
    reads, weights = tuple(values.items()), in_one(matrices, finds, changes.kernels)
    find = finds[0] if len(finds) == 1 else None  # experts have no biases to change
    return Task(item, reads, weights, biases, item.pieces, find, statistics, consults=consults)


def changed_floats(source: Source, changes: ModelChanges) -> Callable[[str, Tensor], Tensor]:
    """(name of a source tensor, its float32 value) -> what transforms make of it, float32."""

    def changed(name: str, tensor: Tensor) -> Tensor:
        part, _, suffix = name.rpartition(".")
        if part not in changes.touched:
            return tensor
        (change,) = changes.of((part,), partial(floats_of, source))
        if suffix == BIAS:
            return change.bias(tensor, changes.kernels)
        matrix = tensor.view(-1, tensor.shape[-1])
        return change.weight(matrix, kernels=changes.kernels).view(tensor.shape)

    return changed


def floats_of(source: Source, name: str) -> Tensor:
    """The weight of a linear, norm or embedding as the source has it; what it holds as codes of no
    scheme is decoded.

    Raises:
        DamagedSourceError: if a gain of a norm is not finite. It goes into other weights, which
            would be blamed for it.
    """
    encoding = source.quantization.encoding(name)
    if encoding == FLOAT:
        weight = source.read(f"{name}.{WEIGHT}")
        if weight.dim() == 1:
            require_finite(f"{name}.{WEIGHT}", weight)
        return weight
    tensors = {stored: source.read(stored) for stored in encoding.stored(name, source.slots)}
    return read_weights(encoding, [name], tensors).floats()


def changed_biases(
    biases: Sequence[Tensor], changes: FindChanges | None, kernels: Kernels
) -> Sequence[Tensor]:
    """The biases [N] of the parts of a linear after the changes of these parts."""
    if changes is None:
        return biases
    return [change.bias(b, kernels) for change, b in zip(changes(), biases, strict=True)]


class _Output:
    """The stored tensors of an item on their way to the file, hashed as they go."""

    def __init__(self, item: Item, file: WeightFileWriter) -> None:
        self._item, self._file = item, file
        self._forms = stored_forms(item.scheme, item.shape, item.layout, bool(item.biases))
        self._batch = len(item.shape) - 2
        self._places = item.scheme.places(item.layout)
        self._digests = {suffix: blake3() for suffix in self._forms}
        self._gathered: dict[str, Tensor] = {}
        self._whole: set[str] = set()

    def put(self, piece: Piece, tensors: Mapping[str, Tensor]) -> None:
        """Writes what a piece has become; the pieces come in their order.

        A tensor in which a piece is not one range (such as scales for groups of inputs, when the
        pieces are outputs) is kept until it is whole; such tensors are small. One that no axis
        divides comes with every piece, and is written with the first.
        """
        for suffix, tensor in tensors.items():
            place = self._places.get(suffix, {}).get(piece.axis)
            if place is None:
                self._write_whole(suffix, tensor)
            elif (offset := self._offset(suffix, place, piece)) is not None:
                self._write(suffix, offset, tensor)
            else:
                self._gather(suffix, place, piece, tensor)

    def finish(self) -> dict[str, str]:
        """Writes what was kept; the BLAKE3 of every stored tensor, by full name."""
        for suffix, tensor in self._gathered.items():
            self._write(suffix, 0, tensor)
        return {
            self._item.stored_name(suffix): digest.hexdigest()
            for suffix, digest in self._digests.items()
        }

    def _write_whole(self, suffix: str, tensor: Tensor) -> None:
        if suffix not in self._whole:
            self._whole.add(suffix)
            self._write(suffix, 0, tensor)

    def _write(self, suffix: str, offset: int, tensor: Tensor) -> None:
        data = tensor_bytes(tensor)
        self._file.write(self._item.stored_name(suffix), offset, data)
        self._digests[suffix].update(data)

    def _offset(self, suffix: str, place: Place, piece: Piece) -> int | None:
        return byte_offset(self._forms[suffix], place, piece, self._batch)

    def _gather(self, suffix: str, place: Place, piece: Piece, tensor: Tensor) -> None:
        if suffix not in self._gathered:
            form = self._forms[suffix]
            self._gathered[suffix] = torch.empty(form.shape, dtype=form.dtype)
        start, length = piece.start // place.unit, tensor.shape[place.axis]
        gathered = self._gathered[suffix]
        matrix = gathered.flatten(0, self._batch - 1)[piece.matrix] if self._batch else gathered
        matrix.narrow(place.axis, start, length).copy_(tensor)


def convert(
    task: Task,
    file: WeightFileWriter,
    kernels: Kernels,
    crew: Crew,
    hash_source: bool,
    advance: Callable[[], None],
) -> Done:
    """Packs, writes and hashes an item piece by piece, while each piece is in a core's cache.

    Args:
        task: the item and its source.
        file: that takes the tensors.
        kernels: to pack with.
        crew: for the experts of a linear.
        hash_source: note the hash of every source tensor as well.
        advance: called before each piece, and before each chunk of a linear whose codes are
            chosen together; it may raise to end the work.

    Raises:
        CheckpointError: if the source is damaged or the disk refuses.
    """
    task = task.quantized(kernels, crew, advance)
    with closing(task.weights):
        return _made(task, file, kernels, hash_source, advance)


def _made(
    task: Task,
    file: WeightFileWriter,
    kernels: Kernels,
    hash_source: bool,
    advance: Callable[[], None],
) -> Done:
    """See `convert`; of a task whose codes are chosen."""
    output = _Output(task.item, file)
    origin = _Origin(task) if hash_source and not task.is_verbatim else None
    errors = _Errors(task.pieces)
    for index, piece in enumerate(task.pieces):
        advance()
        packed = task.pack(index, kernels)
        output.put(piece, packed.tensors)
        if origin is not None:
            origin.advance(piece)
        if packed.sums is not None:
            errors.add(piece, packed.sums)
    stored = output.finish()
    source = origin.hashes() if origin else {}
    if hash_source and task.is_verbatim:
        source = dict(zip((name for name, _ in task.reads), stored.values(), strict=True))
    experts = errors.experts_sqnr_db()
    return Done(task.item.name, stored, source, errors.sqnr_db(), experts, task.unreached)


class _Errors:
    """The error sums of all pieces, in memory of their own from the beginning: small tensors that
    outlive the large ones of their piece would keep the allocator from using that memory again."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        lines = sum(piece.stop - piece.start for piece in pieces)
        self._sums, self._count = torch.empty(2, lines, dtype=torch.float64), 0
        self._matrices = [slice(0, 0)] * (pieces[-1].matrix + 1)

    def add(self, piece: Piece, sums: Sums) -> None:
        """Those of the next piece."""
        lines = slice(self._count, self._count + len(sums.signal))
        self._sums[0, lines], self._sums[1, lines] = sums.signal, sums.noise
        self._count = lines.stop
        known = self._matrices[piece.matrix]
        self._matrices[piece.matrix] = slice(known.start if known.stop else lines.start, lines.stop)

    def sqnr_db(self) -> float | None:
        """The figure of all pieces that lost anything."""
        return self._of(slice(0, self._count))

    def experts_sqnr_db(self) -> tuple[float | None, ...]:
        """Those of each expert; none of a single matrix."""
        several = self._matrices if len(self._matrices) > 1 else []
        return tuple(map(self._of, several))

    def _of(self, lines: slice) -> float | None:
        signal, noise = self._sums[:, lines]
        return sqnr_db([Sums(signal, noise)] if len(signal) else [])


class _Origin:
    """The source bytes of a task, hashed in file order while the pieces bring them into memory."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._data = [(name, tensor_bytes(tensor)) for name, tensor in task.reads]
        self._digests = {name: blake3() for name, _ in task.reads}
        self._at = 0

    def advance(self, piece: Piece) -> None:
        """Hashes the bytes that come next, about as many as this piece was made of."""
        weights = sum(data.nbytes for _, data in self._data[: len(self._task.item.weights)])
        last = self._task.pieces[-1]
        length = last.stop * (last.matrix + 1)
        done = last.stop * piece.matrix + piece.stop
        stop = weights * done // length
        if done == length:
            stop = sum(data.nbytes for _, data in self._data)  # the biases as well
        start, self._at = self._at, stop
        for name, data in self._data:
            if start < data.nbytes and stop > 0:
                self._digests[name].update(data[max(start, 0) : stop])
            start, stop = start - data.nbytes, stop - data.nbytes

    def hashes(self) -> dict[str, str]:
        """BLAKE3 of each source tensor."""
        return {name: digest.hexdigest() for name, digest in self._digests.items()}


def stored_blake3(tensor: Tensor) -> str:
    """BLAKE3 of a tensor as it would be stored plainly: rounded to bfloat16."""
    digest = blake3()
    for rows in tensor.split(ROWS_AT_A_TIME):
        digest.update(tensor_bytes(rows.to(torch.bfloat16)))
    return digest.hexdigest()


def require_finite(name: str, tensor: Tensor) -> None:
    """DamagedSourceError naming the first NaN, infinity, or number beyond bfloat16."""
    tensor = tensor if tensor.dim() else tensor[None]  # a scale of the whole
    for start in range(0, tensor.shape[0], ROWS_AT_A_TIME):
        finite = torch.isfinite(tensor[start : start + ROWS_AT_A_TIME].to(torch.bfloat16))
        if not bool(finite.all()):
            first = (~finite).nonzero()[0].tolist()
            first[0] += start
            value = tensor[tuple(first)].item()
            advice = (
                "which is beyond bfloat16: the model cannot be converted as it is"
                if math.isfinite(value)
                else "the source is damaged, download it again"
            )
            raise DamagedSourceError(f"tensor {name} holds {value} at {first}; {advice}")


def require_finite_inputs(
    statistics: Mapping[str, Seen], items: Sequence[Item], source: Source
) -> None:
    """Holds what calibration has seen of a layer against being numbers.

    Args:
        statistics: what was seen of the inputs of linears, by name.
        items: of the layer.
        source: of the model.

    Raises:
        DamagedSourceError: naming the first value of these items that is not finite.
        SourceError: naming the first linear whose inputs are not, if the fault is none of theirs.
    """
    wrong = next((name for name, seen in statistics.items() if not are_finite(seen)), None)
    if wrong is None:
        return
    for name in (name for item in items for name in item.needs):
        require_finite(name, source.read(name))
    raise SourceError(
        f"the inputs of {wrong} on the calibration data, or their squares, are beyond float32: the "
        f"model cannot be calibrated; use a recipe without calibration"
    )
