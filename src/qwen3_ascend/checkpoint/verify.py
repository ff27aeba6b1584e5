"""Checks a finished checkpoint against its own manifest, byte by byte."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qwen3_ascend.checkpoint.files import CheckpointReader, file_sha256, plain_name
from qwen3_ascend.checkpoint.manifest import Manifest
from qwen3_ascend.checkpoint.model import LinearSpec, walk


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


def verify(folder: Path, progress: Callable[[int], None] = lambda nbytes: None) -> Verdict:
    """Re-derives every shape from the model's configuration and re-hashes every byte.

    Args:
        folder: a finished checkpoint.
        progress: called with the bytes of each tensor or file once it is checked.

    Raises:
        CheckpointError: if the folder cannot be opened at all (no manifest, a truncated shard).
    """
    reader = CheckpointReader(folder)
    stored, problems = reader.manifest.stored(), [*_structure(reader)]
    for name, tensor in stored.items():
        if reader.stored_sha256(name) != tensor.sha256:
            problems.append(f"tensor {name} in {tensor.file}: its bytes differ from the manifest")
        progress(tensor.nbytes)
    for name, entry in reader.manifest.files.items():
        problems += _file_problems(folder / plain_name(name), entry.size, entry.sha256)
        progress(entry.size)
    nbytes = total_bytes(reader.manifest)
    files = len(reader.manifest.files) + len(reader.manifest.shards)
    return Verdict(len(stored), files, nbytes, tuple(problems))


def total_bytes(manifest: Manifest) -> int:
    """Bytes of all tensors and of all files that are not shards."""
    tensors = sum(tensor.nbytes for tensor in manifest.stored().values())
    return tensors + sum(entry.size for entry in manifest.files.values())


def _file_problems(path: Path, size: int, sha256: str) -> list[str]:
    if not path.is_file():
        return [f"file {path.name} is missing"]
    if path.stat().st_size != size or file_sha256(path) != sha256:
        return [f"file {path.name}: its bytes differ from the manifest"]
    return []


def _structure(reader: CheckpointReader) -> list[str]:
    """The manifest must describe exactly the tensors of its model, in the model's shapes."""
    manifest, problems = reader.manifest, []
    linears, tensors = set(manifest.linears), set(manifest.tensors)
    for item in walk(manifest.model):
        if isinstance(item, LinearSpec):
            problems += _linear_problems(reader, item)
            linears.discard(item.name)
        else:
            problems += _tensor_problems(reader, *item)
            tensors.discard(item[0])
    problems += [f"{name} is not part of the model" for name in sorted(linears | tensors)]
    names = set(manifest.stored())
    for file in manifest.shards:
        extra = reader.tensor_names(file) - names
        problems += [f"tensor {name} in {file} is not in the manifest" for name in sorted(extra)]
    return problems


def _linear_problems(reader: CheckpointReader, spec: LinearSpec) -> list[str]:
    entry = reader.manifest.linears.get(spec.name)
    if entry is None:
        return [f"linear {spec.name} is missing"]
    parts = tuple(zip(spec.sources, spec.parts, strict=True))
    facts = (entry.shape, entry.parts, entry.cut, "bias" in entry.tensors)
    if facts != ((spec.outputs, spec.inputs), parts, spec.cut, spec.bias):
        return [f"linear {spec.name} does not have the shape, parts or bias of the model"]
    return []


def _tensor_problems(reader: CheckpointReader, name: str, shape: tuple[int, ...]) -> list[str]:
    entry = reader.manifest.tensors.get(name)
    if entry is None:
        return [f"tensor {name} is missing"]
    if entry.shape != shape:
        return [f"tensor {name} is {list(entry.shape)}, but the model needs {list(shape)}"]
    return []
