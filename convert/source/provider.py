"""What a source of weights must be able to do, and the simplest one: a folder on this machine."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qwen3_ascend.errors import CheckpointError, SourceError
from qwen3_ascend.files.safetensors import TensorSlot, read_header

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
CONFIG_NAME = "config.json"

CARRIED_FILES = (
    CONFIG_NAME,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "LICENSE",
)
"""Files that travel unchanged from the source to the output when the source has them."""


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
        """Names of the files in the repository's root; each is a plain file name."""

    def small_file(self, name: str) -> Path:
        """A local path of a small file."""

    def weight_header(self, name: str) -> SourceWeights:
        """The header of a weight file, if possible without its data; from any thread."""

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
        return {path.name for path in self.folder.iterdir() if path.is_file()}

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
