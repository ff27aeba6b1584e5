"""Where the weights come from: a local folder or the Hub. The only network code of the project."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from qwen3_ascend.checkpoint.errors import CheckpointError
from qwen3_ascend.checkpoint.files import file_sha256, plain_name
from qwen3_ascend.checkpoint.manifest import FileEntry
from qwen3_ascend.checkpoint.model import read_json_object
from qwen3_ascend.checkpoint.safetensors_file import MappedFile, TensorSlot, read_header

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
class SourceShard:
    """One weight file of the source: its tensors as its header tells them."""

    name: str
    size: int
    slots: Mapping[str, TensorSlot]


class Provider(Protocol):
    """Fetches single files of a model repository, from disk or from a Hub."""

    repo: str
    revision: str | None

    def names(self) -> set[str]:
        """Names of the files in the repository's root."""

    def small_file(self, name: str) -> Path:
        """A local path of a small file."""

    def shard_header(self, name: str) -> SourceShard:
        """The header of a weight file, if possible without its data."""

    def shard_file(self, name: str) -> Path:
        """A local path of a weight file, downloading it if need be."""

    def shard_sha256(self, name: str) -> str:
        """SHA-256 of a weight file."""


class Source:
    """A model's tensors by name, wherever they lie; weight files are opened when first needed."""

    def __init__(self, provider: Provider) -> None:
        """Reads the index and every header.

        Raises:
            CheckpointError: if there are no weights, the index names a file or tensor that does
                not exist, or a header is damaged.
        """
        self.provider = provider
        self.names = provider.names()
        if CONFIG_NAME not in self.names:
            raise CheckpointError(
                f"{provider.repo} has no {CONFIG_NAME}: this is not a Hugging Face model folder"
            )
        indexed = self._index()
        shard_names = sorted(set(indexed.values())) if indexed else self._single()
        self.shards = {name: provider.shard_header(name) for name in shard_names}
        self.location = {
            tensor: shard.name for shard in self.shards.values() for tensor in shard.slots
        }
        self._check_index(indexed)
        self._open: dict[str, MappedFile] = {}

    def _index(self) -> dict[str, str]:
        if INDEX_NAME not in self.names:
            return {}
        path = self.provider.small_file(INDEX_NAME)
        weight_map = read_json_object(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{path} has no weight_map")
        for tensor, file in weight_map.items():
            if not isinstance(file, str) or plain_name(file) not in self.names:
                raise CheckpointError(f"{path}: tensor {tensor} is in {file}, which is missing")
        return weight_map

    def _single(self) -> list[str]:
        if SINGLE_NAME in self.names:
            return [SINGLE_NAME]
        if any(name.endswith((".bin", ".pth", ".pt")) for name in self.names):
            raise CheckpointError(
                f"{self.provider.repo} holds pickled weights only; save it as safetensors first"
            )
        raise CheckpointError(
            f"{self.provider.repo} holds neither {SINGLE_NAME} nor {INDEX_NAME}: no weights to read"
        )

    def _check_index(self, indexed: Mapping[str, str]) -> None:
        for tensor, file in indexed.items():
            if tensor not in self.shards[file].slots:
                raise CheckpointError(
                    f"{INDEX_NAME} says tensor {tensor} is in {file}, but it is not there"
                )

    def slot(self, tensor: str) -> TensorSlot:
        """Type and shape of a tensor, from its header."""
        return self.shards[self.location[tensor]].slots[tensor]

    def read(self, tensor: str) -> Tensor:
        """A tensor as a view of its mapped file."""
        name = self.location[tensor]
        if name not in self._open:
            self._open[name] = MappedFile(self.provider.shard_file(name))
        return self._open[name].tensor(tensor)

    def release(self, tensors: Iterable[str]) -> None:
        """Closes every weight file that none of the given, still needed, tensors lies in."""
        needed = {self.location[tensor] for tensor in tensors}
        for name in [name for name in self._open if name not in needed]:
            del self._open[name]

    def file_entries(self) -> dict[str, FileEntry]:
        """Size and SHA-256 of every weight file."""
        return {
            name: FileEntry(shard.size, self.provider.shard_sha256(name))
            for name, shard in self.shards.items()
        }

    def carried(self) -> dict[str, bytes]:
        """Config, tokenizer and the like, to be carried over unchanged."""
        found = [name for name in CARRIED_FILES if name in self.names]
        return {name: self.provider.small_file(name).read_bytes() for name in found}


class LocalFolder:
    """A model in a folder on this machine."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder")
        self.folder = folder
        self.repo = folder.resolve().name
        self.revision: str | None = None

    def names(self) -> set[str]:
        """See Provider."""
        return {path.name for path in self.folder.iterdir() if path.is_file()}

    def small_file(self, name: str) -> Path:
        """See Provider."""
        return self.folder / name

    def shard_header(self, name: str) -> SourceShard:
        """See Provider."""
        path = self.folder / name
        return SourceShard(name, path.stat().st_size, read_header(path).slots)

    def shard_file(self, name: str) -> Path:
        """See Provider."""
        return self.folder / name

    def shard_sha256(self, name: str) -> str:
        """See Provider."""
        return file_sha256(self.folder / name)


def open_source(
    model: str,
    revision: str | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> Source:
    """Opens a local folder, or a Hub repository if there is no such folder.

    Args:
        model: a path, or a Hub id such as "Qwen/Qwen3-8B".
        revision: branch, tag or commit; Hub only.
        note: receives a line about each download.

    Raises:
        CheckpointError: if it is neither, or its files are damaged.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if revision:
            raise CheckpointError(f"{model} is a local folder; --revision is for Hub models")
        return Source(LocalFolder(path))
    looks_local = model.startswith((".", "/", "~")) or path.exists()
    if looks_local or not re.fullmatch(r"[\w.\-]+/[\w.\-]+", model):
        raise CheckpointError(
            f"{model} is neither an existing folder nor a Hub id such as Qwen/Qwen3-8B"
        )
    from qwen3_ascend.convert.hub import open_repository

    return Source(open_repository(model, revision, note))
