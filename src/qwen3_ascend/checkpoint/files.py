"""Writing a checkpoint so that no half of one is ever taken for a whole, and reading it by mmap.

The writer builds everything in OUT/.partial and publishes at the end: the old manifest goes first,
then the new files are renamed into place, and the new manifest comes last. At every instant OUT is
a complete checkpoint or visibly none.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor
from typing_extensions import Self

from qwen3_ascend.checkpoint.errors import CheckpointError
from qwen3_ascend.checkpoint.manifest import (
    MANIFEST_NAME,
    FileEntry,
    LinearEntry,
    Manifest,
    StoredTensor,
)
from qwen3_ascend.checkpoint.safetensors_file import Header, MappedFile, build_header
from qwen3_ascend.checkpoint.schemes import Linear, scheme

STAGING = ".partial"
SHARD_PATTERN = "ascend-*.safetensors"
HASH_BLOCK = 1 << 22


@dataclass(frozen=True)
class ShardPlan:
    """A shard before it is written: its file name and the form of each tensor, in file order."""

    file: str
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def shard_name(index: int, count: int) -> str:
    """Name of shard `index` (from 1); no other loader takes it for a file it can read."""
    return f"ascend-{index:05d}-of-{count:05d}.safetensors"


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    return flat.numpy().data if flat.numel() else memoryview(b"")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, streamed."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


class ShardWriter:
    """One shard being written: the header is there from the start, tensors come in any order."""

    def __init__(self, path: Path, plan: ShardPlan) -> None:
        self.plan = plan
        self._header: Header = build_header(plan.tensors)
        self._file: FileIO = path.open("w+b", buffering=0)
        self._missing = set(plan.tensors)
        _write_all(self._file.fileno(), memoryview(self._header.raw), 0)

    def write(self, name: str, tensor: Tensor) -> StoredTensor:
        """Writes a tensor at its place and hashes it."""
        slot = self._header.slots[name]
        if (tensor.dtype, tuple(tensor.shape)) != (slot.dtype, slot.shape):
            raise AssertionError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} was not planned")
        data = tensor_bytes(tensor)
        _write_all(self._file.fileno(), data, slot.start)
        self._missing.remove(name)
        return StoredTensor(slot.dtype, slot.shape, self.plan.file, _sha256(data))

    def read_back(self, name: str) -> Tensor:
        """A written tensor, read from the file again."""
        slot = self._header.slots[name]
        data = bytearray(slot.nbytes)
        _read_all(self._file.fileno(), memoryview(data), slot.start)
        return torch.frombuffer(data, dtype=slot.dtype).view(slot.shape)

    def close(self) -> FileEntry:
        """Forces the file to disk; AssertionError if a planned tensor was not written."""
        if self._missing:
            raise AssertionError(f"{self.plan.file} lacks {sorted(self._missing)[0]}")
        os.fsync(self._file.fileno())
        size = os.fstat(self._file.fileno()).st_size
        self._file.close()
        return FileEntry(size, _sha256(memoryview(self._header.raw)))


class CheckpointWriter:
    """Builds a checkpoint beside its final place and publishes it in one step.

    Use as a context manager; without `commit` nothing of the output changes and what was staged
    is removed.
    """

    def __init__(self, folder: Path, overwrite: bool = False) -> None:
        """Claims a folder.

        Raises:
            CheckpointError: if the folder is in use or not empty (and overwrite is False).
        """
        self.folder, self.staging = folder, folder / STAGING
        check_output(folder, overwrite)
        try:
            self.staging.mkdir(parents=True, exist_ok=True)
            self._lock = (self.staging / "lock").open("w")
        except OSError as error:
            raise CheckpointError(f"cannot write to {folder}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(f"{folder} is being written by another process") from error
        self._clear()
        self.shards: dict[str, FileEntry] = {}
        self.files: dict[str, FileEntry] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._clear()
        self._lock.close()
        shutil.rmtree(self.staging, ignore_errors=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _clear(self) -> None:
        for path in self.staging.iterdir():
            if path.name != "lock":
                path.unlink()

    def open_shard(self, plan: ShardPlan) -> ShardWriter:
        """Starts a shard in the staging folder."""
        return ShardWriter(self.staging / plan.file, plan)

    def close_shard(self, shard: ShardWriter) -> None:
        """Finishes a shard and remembers its size and header hash."""
        self.shards[shard.plan.file] = shard.close()

    def add_file(self, name: str, data: bytes) -> None:
        """Stages a small file (config, tokenizer, model card)."""
        with (self.staging / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self.files[name] = FileEntry(len(data), _sha256(memoryview(data)))

    def commit(self, manifest: Manifest) -> None:
        """Publishes everything staged; the manifest is the last file to appear."""
        text = manifest.text().encode()
        self.add_file(MANIFEST_NAME, text)
        (self.folder / MANIFEST_NAME).unlink(missing_ok=True)
        for old in self.folder.glob(SHARD_PATTERN):
            old.unlink()
        _sync_folder(self.folder)
        for name in [*self.shards, *(name for name in self.files if name != MANIFEST_NAME)]:
            os.replace(self.staging / name, self.folder / name)
        _sync_folder(self.folder)
        os.replace(self.staging / MANIFEST_NAME, self.folder / MANIFEST_NAME)
        _sync_folder(self.folder)


class CheckpointReader:
    """A finished checkpoint: its manifest, and its tensors as views of the mapped files."""

    def __init__(self, folder: Path) -> None:
        """Opens every shard and holds its header against the manifest.

        Raises:
            CheckpointError: naming the file or tensor that is missing or does not fit.
        """
        self.folder = folder
        self.manifest = Manifest.read(folder)
        self._files = {name: self._open(name) for name in self.manifest.shards}
        for name, stored in self.manifest.stored().items():
            self._check_slot(name, stored)
        for name, entry in self.manifest.linears.items():
            self._check_forms(name, entry)

    def _open(self, name: str) -> MappedFile:
        path, entry = self.folder / plain_name(name), self.manifest.shards[name]
        file = MappedFile(path)
        if path.stat().st_size != entry.size:
            raise CheckpointError(f"{path} has another size than its manifest says")
        if _sha256(memoryview(file.header.raw)) != entry.sha256:
            raise CheckpointError(f"{path}: the header was changed after it was written")
        return file

    def _check_slot(self, name: str, stored: StoredTensor) -> None:
        file = self._files.get(stored.file)
        slot = file.header.slots.get(name) if file else None
        if slot is None:
            raise CheckpointError(f"tensor {name} is not in {self.folder / stored.file}")
        if (slot.dtype, slot.shape) != (stored.dtype, stored.shape):
            raise CheckpointError(f"tensor {name} has another type or shape than the manifest says")

    def _check_forms(self, name: str, entry: LinearEntry) -> None:
        """Re-derives what a linear of this scheme and shape must be made of."""
        forms = scheme(entry.scheme).stored(entry.shape, entry.layout, "bias" in entry.tensors)
        held = {suffix: (stored.dtype, stored.shape) for suffix, stored in entry.tensors.items()}
        if held != forms:
            raise CheckpointError(
                f"linear {name}: the stored tensors are not those of a {entry.scheme} "
                f"{list(entry.shape)}"
            )

    def tensor(self, name: str) -> Tensor:
        """An unquantized tensor."""
        return self._files[self.manifest.tensors[name].file].tensor(name)

    def linear(self, name: str) -> Linear:
        """A stored linear; its tensors alias the mapped file."""
        entry = self.manifest.linears[name]
        tensors = {
            suffix: self._files[stored.file].tensor(f"{name}.{suffix}")
            for suffix, stored in entry.tensors.items()
        }
        return scheme(entry.scheme).from_tensors(entry.shape, entry.layout, tensors)

    def stored_sha256(self, name: str) -> str:
        """SHA-256 of the bytes of a stored tensor as they are on disk now."""
        return _sha256(self._files[self.manifest.stored()[name].file].raw(name))

    def tensor_names(self, file: str) -> set[str]:
        """Names of all tensors in a shard."""
        return set(self._files[file].header.slots)


def check_output(folder: Path, overwrite: bool) -> None:
    """Refuses an output that is a file, or a folder with content that nobody agreed to replace."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, not a folder")
    if folder.is_dir() and not overwrite and any(p.name != STAGING for p in folder.iterdir()):
        raise CheckpointError(f"{folder} is not empty; choose another or pass --overwrite")


def plain_name(name: str) -> str:
    """A file name that stays within its folder; CheckpointError for any other."""
    if not name or name != Path(name).name or name in (".", "..") or "\0" in name:
        raise CheckpointError(f"{name!r} is not a plain file name")
    return name


def _sha256(data: memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _read_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.preadv(descriptor, [data], offset)
        if not count:
            raise CheckpointError("a staged file became shorter while it was being written")
        data, offset = data[count:], offset + count


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
