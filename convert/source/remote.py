"""A model on a hub, whichever hub it is: every file is checked before anybody reads it.

The clients of the hubs check little: huggingface_hub 2.4 takes any bytes of the right size for the
file, follows a redirect to another one, and gives up at the first 503. So every download is
repeated for a while, and then its size and its hash are held against what the hub states.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections import defaultdict
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from qwen3_ascend.convert.source.client import Client, RemoteFile
from qwen3_ascend.convert.source.provider import SourceWeights, read_range
from qwen3_ascend.convert.source.transfer import Transfer
from qwen3_ascend.errors import CheckpointError, SourceError
from qwen3_ascend.files.safetensors import MAX_HEADER_BYTES, parse_header, read_header
from qwen3_ascend.files.text import size_text

T = TypeVar("T")

HEADER_GUESS = 100_000
"""Bytes in which most headers fit, so that one request is enough."""

MAX_SMALL_BYTES = 256 << 20
"""No configuration, index or tokenizer is larger; more must not fill the disk unasked."""

CHECK_BLOCK = 1 << 20
"""Bytes hashed at a time; a cancelled conversion ends between two of them."""

DAMAGED_DOWNLOADS = 3
"""So often the same file may arrive damaged. Each time costs the whole file."""


class DamagedError(Exception):
    """A file that is not what its hub says it is."""


class RemoteRepository:
    """Provider for a hub. See the module's docstring."""

    def __init__(self, client: Client, transfer: Transfer, area: Path | None = None) -> None:
        """A provider over an opened client.

        Args:
            client: of the hub.
            transfer: notes, retries, cancellation.
            area: folder for weight files that are removed once they have been used; without it
                they stay in the user's cache.
        """
        self._client, self._transfer, self._area = client, transfer, area
        self.repo, self.revision = client.repo, client.revision
        self.temporary = area is not None
        self.store: Path | None = area or client.cache
        self._digests: dict[str, str] = {}
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def names(self) -> set[str]:
        """See Provider."""
        return set(self._client.files)

    def small_file(self, name: str) -> Path:
        """See Provider."""
        file = self._client.files[name]
        if (file.size or 0) > MAX_SMALL_BYTES:
            raise SourceError(
                f"{self.repo}/{name} has {file.size} bytes; at most {MAX_SMALL_BYTES} are expected"
            )
        return self._fetch(file, None, lambda nbytes: None)

    def weight_header(self, name: str) -> SourceWeights:
        """See Provider; asks the hub for the header alone unless the file is here."""
        file, path = self._client.files[name], self._client.cached(name)
        if path is not None:
            with suppress(CheckpointError):  # a damaged file will be fetched again
                slots = read_header(path).slots
                return SourceWeights(name, path.stat().st_size, slots)
        return self._persist(name, partial(self._remote_header, file))

    def read_range(self, name: str, start: int, nbytes: int) -> bytes:
        """See Provider."""
        path, file = self._client.cached(name), self._client.files[name]
        if path is not None:
            return read_range(path, start, nbytes)
        return self._persist(name, partial(self._client.read_range, file, start, nbytes))

    def is_here(self, name: str) -> bool:
        """See Provider."""
        return self._client.cached(name) is not None or self._is_left_over(name)

    def weight_file(self, name: str) -> Path:
        """See Provider."""
        with self._locks[name]:
            cached = self._client.cached(name)
            file, folder = self._client.files[name], self._area if cached is None else None
            if cached is None:
                size = "" if file.size is None else f" ({size_text(file.size)})"
                self._transfer.note(f"fetching {self.repo}/{name}{size}")
            return self._fetch(file, folder, self._transfer.arrived)

    def weight_sha256(self, name: str) -> str:
        """See Provider."""
        stated = self._client.files[name].sha256
        if stated is None and name not in self._digests:
            self.weight_file(name)
        return stated or self._digests[name]

    def keep_only(self, names: Collection[str]) -> None:
        """See Provider."""
        if self._area is None or not self._area.is_dir():
            return
        for path in self._area.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name.removesuffix(".incomplete") not in names:
                path.unlink()

    def discard(self, name: str) -> None:
        """See Provider."""
        if self._area is not None:
            (self._area / name).unlink(missing_ok=True)

    def close(self) -> None:
        """See Provider."""
        self._transfer.cancelled.set()

    def _is_left_over(self, name: str) -> bool:
        """Whether an interrupted conversion has downloaded the whole file already."""
        path = self._area / name if self._area is not None else None
        size = self._client.files[name].size
        return path is not None and path.is_file() and path.stat().st_size == size

    def _remote_header(self, file: RemoteFile) -> SourceWeights:
        """DamagedError if the header cannot be that of the file, before anything is allocated."""
        head = self._head(file, min(HEADER_GUESS, file.size or 8))
        length = int.from_bytes(head[:8], "little")
        if len(head) < 8 or length > min(MAX_HEADER_BYTES, (file.size or length + 8) - 8):
            raise DamagedError(f"{file.size} bytes that announce a header of {length}")
        if len(head) < 8 + length:
            head = self._head(file, 8 + length)
        try:
            slots = parse_header(head[8 : 8 + length], file.name)
        except CheckpointError as error:
            raise DamagedError(str(error)) from error
        size = max((slot.stop for slot in slots.values()), default=8 + length)
        if file.size is not None and file.size != size:
            raise DamagedError(f"it has {file.size} bytes, but its header describes {size}")
        return SourceWeights(file.name, size, slots)

    def _head(self, file: RemoteFile, nbytes: int) -> bytes:
        head = self._client.read_range(file, 0, nbytes)
        if len(head) < nbytes:
            raise DamagedError(f"its first {nbytes} bytes came as {len(head)}")
        return head

    def _fetch(self, file: RemoteFile, folder: Path | None, arrived: Callable[[int], None]) -> Path:
        def fetch() -> Path:
            meter = _Meter(arrived, self._transfer)
            try:
                path = self._client.download(file, folder, meter)
                self._check(file, path)
            except BaseException:
                meter.take_back()
                raise
            return path

        return self._persist(file.name, fetch)

    def _persist(self, what: str, action: Callable[[], T]) -> T:
        damages = 0

        def judge(error: Exception) -> float | None:
            nonlocal damages
            if not isinstance(error, DamagedError):
                return self._client.judge(error)
            damages += 1
            return 0.0 if damages < DAMAGED_DOWNLOADS else None

        try:
            return self._transfer.persist(what, action, judge)
        except DamagedError as error:
            times = "once" if damages == 1 else f"{damages} times"
            raise SourceError(
                f"{self.repo}/{what} came damaged {times} from {self._client.hub}: {error}; "
                f"try again later or another mirror"
            ) from error
        except Exception as error:
            raise self._client.explain(error, what) or error from error

    def _check(self, file: RemoteFile, path: Path) -> None:
        """Holds a file against what the hub states; removes it if it is another."""
        size, digest = path.stat().st_size, hashlib.sha256()
        git = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        with path.open("rb") as data:
            while block := data.read(CHECK_BLOCK):
                self._transfer.check()
                digest.update(block)
                if file.git_sha1 is not None:
                    git.update(block)
        self._digests[file.name] = digest.hexdigest()
        found = (size, digest.hexdigest(), git.hexdigest())
        stated = (file.size, file.sha256, file.git_sha1)
        names = ("size", "SHA-256", "git object id")
        for what, is_so, should in zip(names, found, stated, strict=True):
            if should is not None and is_so != should:
                self._remove(path)
                raise DamagedError(f"its {what} is {is_so}, the hub states {should}")

    def _remove(self, path: Path) -> None:
        """Removes a damaged file and, in a cache of links, what it links to within that cache."""
        blob = path.resolve()
        if blob.is_relative_to(self._client.cache.resolve()):
            blob.unlink(missing_ok=True)
        path.unlink(missing_ok=True)


class _Meter:
    """Counts the bytes of one attempt, and ends it when the conversion is over."""

    def __init__(self, arrived: Callable[[int], None], transfer: Transfer) -> None:
        self._arrived, self._transfer = arrived, transfer
        self._count = 0

    def __call__(self, nbytes: int) -> None:
        self._transfer.check()
        self._count += nbytes
        self._arrived(nbytes)

    def take_back(self) -> None:
        """The attempt failed: its bytes will have to come again."""
        self._arrived(-self._count)
