"""Checks a finished checkpoint against its own manifest, byte by byte."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from qwen3_ascend.checkpoint.architecture import (
    EMBEDDING,
    LM_HEAD,
    LinearSpec,
    TensorSpec,
    model_spec,
)
from qwen3_ascend.checkpoint.linear import BIAS
from qwen3_ascend.checkpoint.manifest import MANIFEST_NAME, StoredTensor
from qwen3_ascend.checkpoint.reader import CheckpointReader, Sealed, SealedFolder
from qwen3_ascend.errors import CheckpointError, os_errors
from qwen3_ascend.files.threads import run_all

S = TypeVar("S", bound=Sealed)


@dataclass(frozen=True)
class Verdict:
    """What `verify` found: the amount checked, and a line for each thing that differs."""

    tensors: int
    files: int
    nbytes: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return not self.problems


@os_errors(CheckpointError)
def verify(
    folder: Path,
    progress: Callable[[int], None] = lambda nbytes: None,
    threads: int | None = None,
) -> Verdict:
    """Re-derives every shape from the model's configuration and re-hashes every byte.

    Args:
        folder: a finished checkpoint.
        progress: called with the bytes of each tensor or file once it is checked.
        threads: that hash at a time; default one for each processor.

    Raises:
        CheckpointError: if the folder cannot be opened at all (no manifest, a truncated file).
    """
    reader = CheckpointReader(folder, check_files=False)
    return judge(reader, structure_problems(reader), progress, threads)


def judge(
    sealed: SealedFolder[S],
    problems: Sequence[str],
    progress: Callable[[int], None],
    threads: int | None,
) -> Verdict:
    """Re-hashes every byte of a folder; `problems` are what has been found before."""
    manifest = sealed.manifest
    found = [*problems, *_strangers(sealed), *changed_tensors(sealed, progress, threads)]
    found += sealed.file_problems()
    progress(sum(entry.size for entry in manifest.files.values()))
    files = len(manifest.files) + len(manifest.weight_files)
    return Verdict(len(manifest.stored()), files, total_bytes(manifest), tuple(found))


def changed_tensors(
    reader: SealedFolder[S], progress: Callable[[int], None], threads: int | None
) -> list[str]:
    """A line for each tensor whose bytes differ from the manifest, in the manifest's order."""
    stored = reader.manifest.stored()
    changed: set[str] = set()

    def differs(name: str, tensor: StoredTensor) -> tuple[str, bool]:
        return name, reader.blake3(name, tensor.file) != tensor.blake3

    # Large tensors go first, so that no thread is left alone with one at the end.
    names = sorted(stored, key=lambda name: stored[name].nbytes, reverse=True)
    for name, different in run_all((partial(differs, n, stored[n]) for n in names), threads):
        changed |= {name} if different else set()
        progress(stored[name].nbytes)
    return [
        f"tensor {name} in {tensor.file}: its bytes differ from the manifest"
        for name, tensor in stored.items()
        if name in changed
    ]


def total_bytes(manifest: Sealed) -> int:
    """Bytes of all tensors and of all files that are not weight files."""
    tensors = sum(tensor.nbytes for tensor in manifest.stored().values())
    return tensors + sum(entry.size for entry in manifest.files.values())


def structure_problems(reader: CheckpointReader) -> list[str]:
    """A line for each way in which the manifest does not describe exactly the tensors of its
    model, in the model's shapes."""
    manifest, problems = reader.manifest, []
    if manifest.model.num_layers > len(manifest.linears):
        return [f"{MANIFEST_NAME}: {manifest.model.num_layers} layers have too few linears"]
    linears, tensors = set(manifest.linears), set(manifest.tensors)
    for item in model_spec(manifest.model):
        if isinstance(item, LinearSpec):
            problems += _linear_problems(reader, item)
            linears.discard(item.name)
        else:
            problems += _tensor_problems(reader, item)
            tensors.discard(item.name)
    return problems + [f"{name} is not part of the model" for name in sorted(linears | tensors)]


def _strangers(sealed: SealedFolder[S]) -> list[str]:
    """A line for each tensor in a weight file that the manifest does not know."""
    names = set(sealed.manifest.stored())
    return [
        f"tensor {name} in {file} is not in the manifest"
        for file in sealed.manifest.weight_files
        for name in sorted(sealed.tensor_names(file) - names)
    ]


def _linear_problems(reader: CheckpointReader, spec: LinearSpec) -> list[str]:
    entry = reader.manifest.linears.get(spec.name)
    if entry is None:
        return [f"linear {spec.name} is missing"]
    facts = (entry.shape, entry.parts, entry.cut, BIAS in entry.tensors)
    if all(facts != _facts(made) for made in _origins(spec)):
        return [f"linear {spec.name} does not have the shape, parts or bias of the model"]
    return []


def _origins(spec: LinearSpec) -> tuple[LinearSpec, ...]:
    """What a linear may have been made of: a quantized head also of the embedding."""
    return (spec, replace(spec, sources=(EMBEDDING,))) if spec.name == LM_HEAD else (spec,)


def _facts(spec: LinearSpec) -> tuple[object, ...]:
    return spec.shape, tuple(zip(spec.sources, spec.parts, strict=True)), spec.cut, spec.bias


def _tensor_problems(reader: CheckpointReader, spec: TensorSpec) -> list[str]:
    entry = reader.manifest.tensors.get(spec.name)
    if entry is None:
        return [f"tensor {spec.name} is missing"]
    if entry.shape != spec.shape:
        needed = list(spec.shape)
        return [f"tensor {spec.name} is {list(entry.shape)}, but the model needs {needed}"]
    return []
