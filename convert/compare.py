"""Holds a finished checkpoint against the model it was made of: the error figures, once more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qwen3_ascend import native
from qwen3_ascend.checkpoint.architecture import LM_HEAD
from qwen3_ascend.checkpoint.linear import BIAS, Linear, stored_bias
from qwen3_ascend.checkpoint.manifest import LinearEntry, Manifest
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.checkpoint.schemes.pieces import Piece, Sums, sqnr_db
from qwen3_ascend.convert.calibration.factors import FACTORS_NAME, read_factors
from qwen3_ascend.convert.encodings import Encoding, read_matrices
from qwen3_ascend.convert.exchange import WEIGHT
from qwen3_ascend.convert.output.weight_file import tensor_bytes
from qwen3_ascend.convert.source import Source
from qwen3_ascend.convert.transforms import TRANSFORMS, FittedTransform
from qwen3_ascend.convert.transforms.changes import FindChanges
from qwen3_ascend.convert.transforms.parts import model_parts
from qwen3_ascend.convert.transforms.whole import ModelChanges
from qwen3_ascend.convert.weights import Weights, in_one
from qwen3_ascend.convert.work import ROWS_AT_A_TIME, changed_biases, floats_of
from qwen3_ascend.errors import CheckpointError, SourceError
from qwen3_ascend.files.hashing import bytes_blake3
from qwen3_ascend.files.threads import available_threads, run_all


def compare(
    reader: CheckpointReader,
    source: Source,
    progress: Callable[[int], None] = lambda nbytes: None,
    threads: int | None = None,
) -> list[str]:
    """A line for each tensor of a checkpoint that was not made of this source.

    Plain tensors and biases must equal the source's, rounded to bfloat16; of each linear the error
    is measured again from the stored bytes and must be the manifest's. A linear whose codes were
    taken must hold the source's, code for code and scale for scale. Where the manifest holds the
    source tensors' hashes, they are compared as well.

    Args:
        reader: the checkpoint.
        source: the model.
        progress: called with the stored bytes of each tensor once it is compared.
        threads: that work at a time; default one for each processor.

    Raises:
        CheckpointError: if the source lacks a tensor or has one of another shape.
    """
    count, kernels = threads or available_threads(), native.best()
    manifest, problems = reader.manifest, []
    if manifest.source.format != source.quantization.format:
        was, now = manifest.source.format or "floats", source.quantization.format or "floats"
        return [f"the checkpoint was made of a source of {was}, and this one is of {now}"]
    origin = _Origin(source, _changes(reader, kernels), kernels, count)
    source.expect(origin.needed(manifest))
    for name, stored in manifest.tensors.items():
        if not _equal(origin.tensor(name, stored.shape), reader.tensor(name), count):
            problems.append(f"tensor {name} differs from the source's")
        progress(stored.nbytes)
        source.drop_pages()
    for name, entry in manifest.linears.items():
        problems += _linear_problems(name, entry, reader.linear(name), origin)
        progress(sum(tensor.nbytes for tensor in entry.tensors.values()))
        source.drop_pages()
    return [*problems, *_changed(source, manifest.source.tensors, count)]


def _changed(source: Source, noted: Mapping[str, str], threads: int) -> list[str]:
    """A line for each source tensor whose hash is not the noted one."""
    names = [name for name in noted if name in source.location]

    def differs(name: str) -> tuple[str, bool]:
        return name, bytes_blake3(tensor_bytes(source.read(name))) != noted[name]

    found = dict(run_all([partial(differs, name) for name in names], threads))
    return [
        f"source tensor {name} is not the one that was converted: its hash differs"
        for name in names
        if found[name]
    ]


def _linear_problems(
    name: str,
    entry: LinearEntry,
    linear: Linear,
    origin: _Origin,
) -> Iterator[str]:
    weights, kernels = origin.weights(name, entry), origin.kernels
    pieces = linear.scheme.pieces(entry.shape, entry.layout)
    tasks = [partial(_measure, linear, weights, piece, kernels) for piece in pieces]
    measured = dict(run_all(tasks, origin.threads))
    found = sqnr_db([sums for piece in pieces if (sums := measured[piece][1]) is not None])
    if not all(same for same, _ in measured.values()):
        yield f"linear {name}: its codes are not the source's"
    elif found != entry.sqnr_db:
        yield f"linear {name}: {_text(found)} against the source, but the manifest says " + _text(
            entry.sqnr_db
        )
    if linear.bias is not None and not torch.equal(
        stored_bias(origin.bias(name, entry)), linear.bias
    ):
        yield f"linear {name}: its bias differs from the source's"


def _weight_names(entry: LinearEntry, source: Source) -> list[str]:
    """The source tensors that a linear's weight is made of."""
    encoding, inputs = _encoding(entry, source), entry.shape[-1]
    try:
        return [
            f"{part}.{suffix}"
            for parts in entry.matrices
            for part, (_, rows) in zip(parts, entry.parts, strict=True)
            for suffix in encoding.suffixes(part, (rows, inputs), source.slots)
        ]
    except SourceError as error:
        raise CheckpointError(f"{error}: it is another model") from error


@dataclass(frozen=True)
class _Origin:
    """What a checkpoint should have been made of: the source's weights, after the transforms that
    its recipe names."""

    source: Source
    changes: ModelChanges
    kernels: native.Kernels
    threads: int

    def needed(self, manifest: Manifest) -> list[str]:
        """Source tensors in the order in which they are read."""
        names = [name for name in manifest.tensors if name in self.source.location]
        for name, entry in manifest.linears.items():
            names += _weight_names(entry, self.source)
            changed = (part for parts in _changed_parts(name, entry) for part in parts)
            touched = [self.changes.touched.get(part) for part in changed]
            for consulted in (n for touch in touched if touch for n in touch.consults):
                encoding = self.source.quantization.encoding(consulted)
                names += encoding.stored(consulted, self.source.slots)
        return [name for name in names if name in self.source.location]

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A plain tensor: float32 if it is changed."""
        found = _read(self.source, name, shape)
        find = self._find((name.removesuffix(f".{WEIGHT}"),))
        if find is None:
            return found
        matrix = found.view(-1, shape[-1])
        return find()[0].weight(matrix, kernels=self.kernels).view(shape)

    def weights(self, name: str, entry: LinearEntry) -> Weights:
        """The weight of a linear."""
        tensors = {name: self.source.read(name) for name in _weight_names(entry, self.source)}
        found = read_matrices(_encoding(entry, self.source), entry.matrices, tensors)
        finds = [self._find(parts) for parts in _changed_parts(name, entry)]
        return in_one(found, finds, self.kernels, self.threads)

    def bias(self, name: str, entry: LinearEntry) -> Tensor:
        """The bias of a linear, of all its parts."""
        parts = [_read(self.source, f"{part}.{BIAS}", (rows,)) for part, rows in entry.parts]
        find = self._find(_changed_parts(name, entry)[0])  # experts have no bias
        return torch.cat([*changed_biases(parts, find, self.kernels)])

    def _find(self, parts: Sequence[str]) -> FindChanges | None:
        if not any(part in self.changes.touched for part in parts):
            return None
        return partial(self.changes.of, parts, partial(floats_of, self.source))


def _changes(reader: CheckpointReader, kernels: native.Kernels) -> ModelChanges:
    manifest = reader.manifest
    named = manifest.transforms
    if unknown := [name for name in named if name not in TRANSFORMS]:
        raise CheckpointError(
            f"its weights were changed by {', '.join(unknown)}, which this version does not know"
        )
    transforms = [TRANSFORMS[name] for name in named]
    fitted = any(isinstance(transform, FittedTransform) for transform in transforms)
    if fitted and FACTORS_NAME not in manifest.files:
        raise CheckpointError(
            f"{reader.folder} has lost {FACTORS_NAME}, which tells by what its weights were "
            f"multiplied: without it they cannot be compared"
        )
    changes = ModelChanges(model_parts(manifest.model), transforms, kernels)
    if FACTORS_NAME in manifest.files:
        path = reader.folder / FACTORS_NAME
        changes.add(read_factors(path.read_bytes(), str(path)))
    return changes


def _changed_parts(name: str, entry: LinearEntry) -> tuple[tuple[str, ...], ...]:
    """See Item.changed."""
    return ((name,),) if name == LM_HEAD else entry.matrices


def _encoding(entry: LinearEntry, source: Source) -> Encoding:
    """How the source's tensors were read for a linear."""
    kept = entry.scheme if entry.codes == "taken" else None
    found = source.quantization.encoding(entry.matrices[0][0]).under(kept)
    if found is None or found.codes != entry.codes:
        raise CheckpointError(
            f"linear {entry.parts[0][0]} is {entry.codes}, which it cannot be of this source: it "
            f"is another model"
        )
    return found


def _measure(
    linear: Linear, weights: Weights, piece: Piece, kernels: native.Kernels
) -> tuple[Piece, tuple[bool, Sums | None]]:
    """Whether a piece has the source's codes, and its errors."""
    part = linear.piece(piece)
    return piece, (weights.has_codes(part, piece), weights.errors(part, piece, kernels))


def _read(source: Source, name: str, shape: tuple[int, ...]) -> Tensor:
    if name not in source.location:
        raise CheckpointError(f"the source has no tensor {name}: it is another model")
    found = source.slot(name).shape
    if found != shape:
        raise CheckpointError(
            f"tensor {name} is {list(found)} in the source and {list(shape)} here: another model"
        )
    return source.read(name)


def _equal(source: Tensor, stored: Tensor, threads: int) -> bool:
    """Whether the stored bits are the source's, rounded to bfloat16."""

    def same(start: int) -> bool:
        rows = slice(start, start + ROWS_AT_A_TIME)
        found = source[rows].to(torch.bfloat16)
        return torch.equal(found.view(torch.int16), stored[rows].view(torch.int16))

    starts = range(0, source.shape[0], ROWS_AT_A_TIME)
    return all(run_all([partial(same, start) for start in starts], threads))


def _text(figure: float | None) -> str:
    return "exact" if figure is None else f"{figure:.2f} dB"
