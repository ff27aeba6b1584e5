"""What a source of weights must be able to do, and the simplest one: a folder on this machine."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qwen3_ascend.checkpoint.companions import file_names
from qwen3_ascend.errors import CheckpointError, SourceError
from qwen3_ascend.files.safetensors import TensorSlot, read_header


@dataclass(frozen=True)
class SourceWeights:
    """One weight file of the source: its tensors as its header tells them."""

    name: str
    size: int
    slots: Mapping[str, TensorSlot]


class Provider(Protocol):
    """Fetches single files of a model repository, from disk or from a hub."""

    repo: str
    revision: str | None

    store: Path | None
    """Folder that downloads go to; None if nothing is ever downloaded."""

    temporary: bool
    """Whether downloaded weight files are removed once they have been used (--low-disk)."""

    def names(self) -> set[str]:
        """Names of the files in the repository's root, and of its named chat templates."""

    def small_file(self, name: str) -> Path:
        """A local path of a small file."""

    def weight_header(self, name: str) -> SourceWeights:
        """The header of a weight file, if possible without its data; from any thread."""

    def read_range(self, name: str, start: int, nbytes: int) -> bytes:
        """Bytes of a weight file, without fetching the rest of it; they are not checked."""

    def is_here(self, name: str) -> bool:
        """Whether a weight file needs no download."""

    def weight_file(self, name: str) -> Path:
        """A local path of a weight file, downloading and checking it if need be; from any
        thread."""

    def weight_sha256(self, name: str) -> str | None:
        """SHA-256 of a weight file that its hub states and that is or will be checked before it is
        read; of a file of which the hub states none, what was found. None for a folder."""

    def keep_only(self, names: Collection[str]) -> None:
        """Removes what an earlier, interrupted conversion downloaded, but for these files."""

    def discard(self, name: str) -> None:
        """Removes a weight file if it was downloaded for this conversion only."""

    def close(self) -> None:
        """Cancels downloads that are under way."""


def read_range(path: Path, start: int, nbytes: int) -> bytes:
    """Bytes of a file on this machine."""
    with path.open("rb") as file:
        file.seek(start)
        return file.read(nbytes)


class LocalFolder:
    """A model in a folder on this machine; nothing in it is ever changed."""

    store: Path | None = None
    temporary = False

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise SourceError(f"{folder} is not a folder")
        self.folder = folder
        self.repo = folder.resolve().name
        self.revision: str | None = None

    def names(self) -> set[str]:
        """See Provider."""
        return file_names(self.folder)

    def small_file(self, name: str) -> Path:
        """See Provider."""
        return self.folder / name

    def weight_header(self, name: str) -> SourceWeights:
        """See Provider."""
        path = self.folder / name
        try:
            return SourceWeights(name, path.stat().st_size, read_header(path).slots)
        except CheckpointError as error:
            raise SourceError(str(error)) from error

    def read_range(self, name: str, start: int, nbytes: int) -> bytes:
        """See Provider."""
        return read_range(self.folder / name, start, nbytes)

    def is_here(self, name: str) -> bool:
        """See Provider."""
        return True

    def weight_file(self, name: str) -> Path:
        """See Provider."""
        return self.folder / name

    def weight_sha256(self, name: str) -> str | None:
        """See Provider."""
        return None

    def keep_only(self, names: Collection[str]) -> None:
        """See Provider."""

    def discard(self, name: str) -> None:
        """See Provider."""

    def close(self) -> None:
        """See Provider."""
