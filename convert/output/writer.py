"""Writing an output so that no half of one is ever taken for a whole, and no work is lost.

Everything is built in OUT/.partial, with a journal of what is finished; who is interrupted there
continues there. At the end it is published: the journal notes which files move, the old seal goes
first, then the new files are renamed into place, and the new seal comes last. At every instant OUT
is complete or visibly not, and the same command completes it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from types import TracebackType

from typing_extensions import Self

from qwen3_ascend.checkpoint.companions import safe_name
from qwen3_ascend.checkpoint.manifest import FileEntry
from qwen3_ascend.convert.output.journal import (
    JOURNAL,
    Done,
    Identity,
    Journal,
    Publication,
    Record,
    difference,
    read_journal,
)
from qwen3_ascend.convert.output.weight_file import STAGING, WeightFilePlan, WeightFileWriter
from qwen3_ascend.errors import CheckpointError, DamagedSourceError, UserError, is_mendable
from qwen3_ascend.files.hashing import bytes_blake3

LOCK = "lock"

CLAIMS = 3
"""Attempts to lock: the last owner may remove folder or lock between our steps."""


@dataclass(frozen=True)
class OutputKind:
    """What an output is.

    Attributes:
        what: the work that makes it, for people.
        seal: the file that comes last: with it, the output is complete.
        files: plain names of the files of such an output that is in a folder, as far as they are
            known; none if there is none.
    """

    what: str
    seal: str
    files: Callable[[Path], Iterable[str]]


class OutputWriter:
    """Builds an output beside its final place and publishes it in one step.

    Use as a context manager. Without `commit` nothing of the output changes; what is staged stays
    for the next run, unless nothing was finished or the source turned out to be damaged.
    """

    def __init__(
        self,
        folder: Path,
        kind: OutputKind,
        plans: Sequence[WeightFilePlan],
        identity: Identity,
        *,
        overwrite: bool = False,
        restart: bool = False,
    ) -> None:
        """Claims a folder and takes up what an interrupted run has left in it.

        Args:
            folder: the output.
            kind: what it is.
            plans: its weight files.
            identity: everything that decides its bytes.
            overwrite: replace what is there.
            restart: discard interrupted work instead of continuing it.

        Raises:
            CheckpointError: if the folder is in use, is not empty (and overwrite is False), or
                holds interrupted work on something else (and restart is False).
        """
        self.folder, self.kind, self.staging = folder, kind, folder / STAGING
        check_output(folder, overwrite)
        self._lock = _claim(self.staging)
        try:
            self.finished = False
            left = self._recover(identity, overwrite, restart)
        except BaseException:
            self._lock.close()
            raise
        self.left: dict[str, Done] = dict(left.done) if left else {}
        self.files: dict[str, FileEntry] = {}
        self._syncer = ThreadPoolExecutor(1)
        self._syncs: list[Future[None]] = []
        self.weight_files = {
            plan.file: WeightFileWriter(self.staging, plan, self._syncer) for plan in plans
        }
        self._published = self.finished
        self._journal = Journal(self.staging, identity, self.left.values())
        self._any_done = bool(self.left)

    def _recover(self, identity: Identity, overwrite: bool, restart: bool) -> Record | None:
        """What an interrupted run has left, if this one may continue it."""
        left = read_journal(self.staging)
        other = difference(left.identity, identity) if left else None
        if left is not None and self._is_complete(left):
            if other is None and not restart:
                self.finished = True
                return left
            if not overwrite:
                raise _not_empty(self.folder)
            left = None
        elif left is not None and other is not None and not restart:
            raise CheckpointError(
                f"{self.folder} holds an interrupted {self.kind.what} of something else ({other}); "
                f"repeat that command to complete it, or pass --restart to discard it"
            )
        elif left is not None and left.publication is not None:
            self._take_back(left.publication)
        if left is None or restart:
            _clear(self.staging)
            return None
        return left

    def _is_complete(self, left: Record) -> bool:
        """Whether all that is missing is the removal of the staging folder."""
        publication, seal = left.publication, self.folder / self.kind.seal
        if publication is None or not seal.is_file():
            return False
        return bytes_blake3(seal.read_bytes()) == publication.seal_blake3

    def _take_back(self, publication: Publication) -> None:
        """Undoes a publication that was interrupted; its old files go, as it had begun to do."""
        for name in map(safe_name, publication.names):
            if not (self.staging / name).exists() and (self.folder / name).exists():
                os.replace(self.folder / name, self.staging / name)
        for name in map(safe_name, publication.old):
            (self.folder / name).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._syncer.shutdown(cancel_futures=True)
        for file in self.weight_files.values():
            file.abandon()
        self._journal.close()
        keep = not self._published and self._is_worth_keeping(error)
        if not keep:
            _clear(self.staging)
            (self.staging / LOCK).unlink()
            with suppress(OSError):  # the next process is already in it
                self.staging.rmdir()
        self._lock.close()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()
        if keep and error is not None and is_mendable(error):
            said = error.strerror or error if isinstance(error, OSError) else error
            kind = type(error) if isinstance(error, UserError) else CheckpointError
            raise kind(f"{said}; what is done is kept, the same command continues") from error

    def _is_worth_keeping(self, error: BaseException | None) -> bool:
        """Whether items are done, or weights were downloaded into the staging folder."""
        begun = self._any_done or any(path.is_dir() for path in self.staging.iterdir())
        return begun and not isinstance(error, DamagedSourceError)

    def note(self, done: Done) -> None:
        """Remembers that an item's tensors are written; from any thread."""
        self._journal.add(done)
        self._any_done = True

    def finish_weight_file(self, file: str) -> None:
        """Forces a weight file of which every tensor is written to disk, in the background."""
        self._syncs.append(self.weight_files[file].finish())

    def add_file(self, name: str, data: bytes) -> None:
        """Stages a small file (config, tokenizer, model card)."""
        self._stage(safe_name(name), data)
        self.files[name] = FileEntry(len(data), bytes_blake3(data))

    def _stage(self, name: str, data: bytes) -> None:
        path = self.staging / name
        try:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
        except OSError as error:
            raise CheckpointError(f"cannot write {path}: {error.strerror}") from error
        self._syncs.append(self._syncer.submit(_sync, path))

    def commit(self, sealed: bytes) -> None:
        """Publishes everything staged; the seal, which holds these bytes, is the last to appear."""
        seal = self.kind.seal
        self._stage(seal, sealed)
        for sync in self._syncs:
            sync.result()
        _sync(self.staging)
        names = (*self.weight_files, *self.files, seal)
        old = self._old_files()
        self._journal.publish(Publication(names, old, bytes_blake3(sealed)))
        for name in old:
            (self.folder / name).unlink(missing_ok=True)
        _sync(self.folder)
        for name in names:
            if name == seal:
                _sync(self.folder)
            (self.folder / name).parent.mkdir(exist_ok=True)
            os.replace(self.staging / name, self.folder / name)
        _sync(self.folder)
        self._published = True

    def _old_files(self) -> tuple[str, ...]:
        """The files of the output that is there, its seal first."""
        names = [self.kind.seal, *self.kind.files(self.folder)]
        return tuple(name for name in dict.fromkeys(names) if (self.folder / name).is_file())


def check_output(folder: Path, overwrite: bool) -> None:
    """Refuses an output that is a file, or a folder with content that nobody agreed to replace."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, not a folder")
    if overwrite or not folder.is_dir():
        return
    left = read_journal(folder / STAGING)
    ours = {STAGING}
    if left is not None and left.publication is not None:
        ours |= {*left.publication.names, *left.publication.old}
    if any(path.name not in ours for path in folder.iterdir()):
        raise _not_empty(folder)


def _not_empty(folder: Path) -> CheckpointError:
    return CheckpointError(f"{folder} is not empty; choose another or pass --overwrite")


def _sync(path: Path) -> None:
    """Forces a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _claim(staging: Path) -> TextIOWrapper:
    """Makes the staging folder and locks it for this process."""
    for _ in range(CLAIMS):
        try:
            staging.mkdir(parents=True, exist_ok=True)
            lock = (staging / LOCK).open("w")
        except OSError as error:
            problem = CheckpointError(f"cannot write to {staging.parent}: {error.strerror}")
            problem.__cause__ = error
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(
                f"{staging.parent} is being written by another process"
            ) from error
        if _is_current(lock, staging / LOCK):
            return lock
        lock.close()
        problem = CheckpointError(f"{staging.parent} is being written by another process")
    raise problem


def _is_current(lock: TextIOWrapper, path: Path) -> bool:
    """Whether the locked file is the one that others will find."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _clear(staging: Path) -> None:
    """Removes all but the lock; the journal last, so that it is believed as long as it can be."""
    for path in sorted(staging.iterdir(), key=lambda path: path.name == JOURNAL):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
