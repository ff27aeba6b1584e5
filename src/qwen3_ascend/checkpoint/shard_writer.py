"""One shard being written: pieces of its tensors arrive in any order, from any thread."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from qwen3_ascend.checkpoint.errors import CheckpointError
from qwen3_ascend.checkpoint.files import ShardPlan
from qwen3_ascend.checkpoint.hashing import bytes_sha256, range_sha256
from qwen3_ascend.checkpoint.journal import Done
from qwen3_ascend.checkpoint.manifest import FileEntry
from qwen3_ascend.checkpoint.safetensors_file import Header, build_header

SYNC_BYTES = 1 << 27
"""After so many bytes the disk is asked to begin: then little is left to wait for at the end."""


class ShardWriter:
    """A shard in the staging folder. What an interrupted run wrote into it stays."""

    def __init__(self, folder: Path, plan: ShardPlan, syncer: ThreadPoolExecutor) -> None:
        self.plan, self._path, self._syncer = plan, folder / plan.file, syncer
        self._header: Header = build_header(plan.tensors)
        self._size = max(slot.stop for slot in self._header.slots.values())
        self._descriptor: int | None = None
        self._sync: Future[None] | None = None
        self._unsynced = 0

    @property
    def entry(self) -> FileEntry:
        """What the manifest says of the finished file."""
        return FileEntry(self._size, bytes_sha256(self._header.raw))

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Writes a piece of a tensor at its place; CheckpointError if the disk refuses."""
        descriptor = self.open()
        place = self._header.slots[name].start + offset
        try:
            _write_all(descriptor, data, place)
            self._begin_sync(descriptor, data.nbytes)
        except OSError as error:
            raise CheckpointError(f"cannot write {self._path}: {error.strerror}") from error

    def open(self) -> int:
        """Opens the file, with its header, when it is first needed; not thread safe."""
        if self._descriptor is None:
            try:
                self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
                if os.fstat(self._descriptor).st_size > self._size:
                    os.ftruncate(self._descriptor, self._size)
                _write_all(self._descriptor, memoryview(self._header.raw), 0)
            except OSError as error:
                raise CheckpointError(f"cannot write {self._path}: {error.strerror}") from error
        return self._descriptor

    def holds(self, done: Done) -> bool:
        """Whether an item's tensors are in the file as the journal says."""
        try:
            return all(self._sha256(name) == sha256 for name, sha256 in done.sha256.items())
        except (OSError, CheckpointError):
            return False

    def _sha256(self, name: str) -> str:
        slot = self._header.slots[name]
        return range_sha256(self._path, slot.start, slot.stop)

    def finish(self) -> Future[None]:
        """Forces the file to disk and closes it, in the background."""
        return self._syncer.submit(self._close)

    def _begin_sync(self, descriptor: int, nbytes: int) -> None:
        # A race between threads costs no more than one more or one less of these hints.
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


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
