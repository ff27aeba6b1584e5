"""What a hub's own library must be able to do for us."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qwen3_ascend.checkpoint.companions import is_template
from qwen3_ascend.errors import SourceError


@dataclass(frozen=True)
class RemoteFile:
    """A file as its hub describes it; None where the hub states nothing.

    Attributes:
        name: a plain file name.
        size: in bytes.
        sha256: of the content.
        git_sha1: of the content as a git object, for files that git itself holds.
    """

    name: str
    size: int | None
    sha256: str | None = None
    git_sha1: str | None = None


class Client(Protocol):
    """One hub's own library, for one model at one commit."""

    repo: str
    revision: str | None
    hub: str
    files: Mapping[str, RemoteFile]
    cache: Path

    def cached(self, name: str) -> Path | None:
        """The file, if it is in the user's cache already."""

    def download(self, file: RemoteFile, folder: Path | None, meter: Callable[[int], None]) -> Path:
        """Fetches a file into a folder, or into the user's cache. The meter is told of bytes that
        arrive, and may raise to end the download."""

    def read_range(self, file: RemoteFile, start: int, nbytes: int) -> bytes:
        """Bytes of a file, at most so many, without fetching the rest of it; the first ones
        instead from a server that knows no ranges."""

    def judge(self, error: Exception) -> float | None:
        """See Transfer.persist."""

    def explain(self, error: Exception, file: str) -> SourceError | None:
        """What the user can do about an error that a file met; None if the library knows none."""


def is_wanted(name: str) -> bool:
    """Whether a file that a hub lists may be part of a model; sub-folders hold other formats."""
    return is_plain(name) or is_template(name)


def is_plain(name: str) -> bool:
    """Whether a name that a hub lists is that of a file in the root, safe on any file system."""
    return name.isprintable() and not {"/", "\\"} & set(name) and name not in ("", ".", "..")
