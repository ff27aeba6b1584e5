"""One weight file being written: pieces of its tensors arrive in any order, from any thread."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from qwen3_ascend.checkpoint.manifest import FileEntry
from qwen3_ascend.convert.output.journal import Done
from qwen3_ascend.errors import CheckpointError
from qwen3_ascend.files.hashing import bytes_blake3, range_blake3
from qwen3_ascend.files.safetensors import Form, Header, build_header

STAGING = ".partial"
"""Folder within the output in which a checkpoint is built."""


@dataclass(frozen=True)
class WeightFilePlan:
    """A weight file before it is written.

    Attributes:
        file: its name.
        tensors: the form of each, in file order.
        metadata: what else its header says.
    """

    file: str
    tensors: Mapping[str, Form]
    metadata: Mapping[str, str] = field(default_factory=dict)


def numbered(stem: str, index: int, count: int) -> str:
    """Name of weight file `index`, counted from 1, of `count`."""
    return f"{stem}-{index:05d}-of-{count:05d}.safetensors"


def fill_files(
    groups: Iterable[Mapping[str, Form]],
    max_file_bytes: int,
    stem: str,
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> tuple[WeightFilePlan, ...]:
    """Fills files in order; the tensors of one group stay together.

    Args:
        groups: of tensors that belong together, by name.
        max_file_bytes: size at which a new file begins.
        stem: what the names of all files begin with.
        metadata: of every file.
    """
    files: list[dict[str, Form]] = [{}]
    filled = 0
    for group in groups:
        nbytes = sum(form.nbytes for form in group.values())
        if files[-1] and filled + nbytes > max_file_bytes:
            files.append({})
            filled = 0
        files[-1].update(group)
        filled += nbytes
    return tuple(
        WeightFilePlan(numbered(stem, index, len(files)), tensors, metadata)
        for index, tensors in enumerate(files, 1)
    )


SYNC_BYTES = 1 << 25
"""After so many bytes the disk is asked to begin: then little is left to wait for at the end."""


class WeightFileWriter:
    """A weight file in the staging folder. What an interrupted run wrote into it stays."""

    def __init__(self, folder: Path, plan: WeightFilePlan, syncer: ThreadPoolExecutor) -> None:
        """A file that is not opened yet; `syncer` is one thread, which waits for the disk."""
        self.plan, self._path, self._syncer = plan, folder / plan.file, syncer
        # The system lets one thread at a time write to a file, and has others wait wide awake.
        self._writing = threading.Lock()
        self._header: Header = build_header(plan.tensors, plan.metadata)
        self._size = max(slot.stop for slot in self._header.slots.values())
        self._descriptor: int | None = None
        self._sync: Future[None] | None = None
        self._unsynced = 0

    @property
    def entry(self) -> FileEntry:
        """What the manifest says of the finished file."""
        return FileEntry(self._size, bytes_blake3(self._header.raw))

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Writes a piece of a tensor at its place; CheckpointError if the disk refuses."""
        descriptor = self.open()
        place = self._header.slots[name].start + offset
        try:
            with self._writing:
                _write_all(descriptor, data, place)
                self._begin_sync(descriptor, data.nbytes)
        except OSError as error:
            raise CheckpointError(f"cannot write {self._path}: {error.strerror}") from error

    def open(self) -> int:
        """Opens the file, with its header, when it is first needed; not thread safe."""
        if self._descriptor is None:
            try:
                self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
                # It has its whole size at once, so that what is in it can be read back.
                os.ftruncate(self._descriptor, self._size)
                _reserve(self._descriptor, self._size)
                _write_all(self._descriptor, memoryview(self._header.raw), 0)
            except OSError as error:
                raise CheckpointError(f"cannot write {self._path}: {error.strerror}") from error
        return self._descriptor

    def holds(self, done: Done) -> bool:
        """Whether an item's tensors, read again, are what the journal says."""
        slots = self._header.slots
        try:
            return all(
                range_blake3(self._path, slots[name].start, slots[name].stop) == blake3
                for name, blake3 in done.blake3.items()
            )
        except (OSError, CheckpointError):
            return False

    def finish(self) -> Future[None]:
        """Forces the file to disk and closes it, in the background."""
        return self._syncer.submit(self._close)

    def _begin_sync(self, descriptor: int, nbytes: int) -> None:
        self._unsynced += nbytes
        if self._unsynced >= SYNC_BYTES and (self._sync is None or self._sync.done()):
            self._unsynced = 0
            if self._sync is not None:
                self._sync.result()  # the system reports an error to one call only
            self._sync = self._syncer.submit(os.fdatasync, descriptor)

    def _close(self) -> None:
        descriptor = self.open()
        size = os.fstat(descriptor).st_size
        if size != self._size:
            raise AssertionError(f"{self.plan.file} has {size} bytes, not {self._size}")
        if self._sync is not None:
            self._sync.result()
        os.fsync(descriptor)
        self.abandon()

    def abandon(self) -> None:
        """Closes the file as it is."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor, not copied if it is contiguous."""
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    return flat.numpy().data if flat.numel() else memoryview(b"")


def _reserve(descriptor: int, nbytes: int) -> None:
    """Takes a file's place on the disk at once, where the system and the file system can.

    Writing is a third faster then, and a disk that is too small says so before the work is done.
    The C library's posix_fallocate would write to every block where the file system cannot.
    """
    try:
        allocate = ctypes.CDLL(None, use_errno=True).fallocate
    except AttributeError:
        return
    allocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if allocate(descriptor, 0, 0, nbytes):
        code = ctypes.get_errno()
        if code not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINTR):
            raise OSError(code, os.strerror(code))


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
