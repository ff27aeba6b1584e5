"""Names, hashes and the reader of a checkpoint's files; `writer` makes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from qwen3_ascend.checkpoint.companions import loaded_files, safe_name
from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.checkpoint.linear import BIAS, Linear, stored_forms
from qwen3_ascend.checkpoint.manifest import FileEntry, LinearEntry, Manifest, StoredTensor
from qwen3_ascend.errors import CheckpointError
from qwen3_ascend.files.hashing import bytes_blake3, file_blake3
from qwen3_ascend.files.safetensors import Form, MappedFile


class Sealed(Protocol):
    """What states the hash of every byte of a folder: a manifest, or the record of an export."""

    @property
    def weight_files(self) -> Mapping[str, FileEntry]:
        """Those that hold the tensors; each hash is of the header."""

    @property
    def files(self) -> Mapping[str, FileEntry]:
        """Every other file."""

    def stored(self) -> dict[str, StoredTensor]:
        """Every tensor by its name in the weight files."""


S = TypeVar("S", bound=Sealed)


class SealedFolder(Generic[S]):
    """Weight files and small files that are as a manifest says.

    Opening it finds every structural damage (a file that is missing, cut, swapped or replaced, a
    header that was edited) but reads neither tensors nor small files.
    """

    def __init__(self, folder: Path, manifest: S) -> None:
        """Opens every weight file and holds its header against the manifest.

        Raises:
            CheckpointError: naming the file or tensor that is missing or does not fit.
        """
        self.folder, self.manifest = folder, manifest
        self._files = {name: self._open(name) for name in manifest.weight_files}
        for name, stored in manifest.stored().items():
            self._check_slot(name, stored)

    def file_problems(self) -> list[str]:
        """A line for each small file that is missing, differs from the manifest, or would be
        loaded although the manifest does not know it."""
        found = []
        for name, entry in self.manifest.files.items():
            path = self.folder / safe_name(name)
            if not path.is_file():
                found.append(f"file {name} is missing")
            elif path.stat().st_size != entry.size or file_blake3(path) != entry.blake3:
                found.append(f"file {name}: its bytes differ from the manifest")
        for name in loaded_files(self.folder):
            if name not in self.manifest.files:
                found.append(f"file {name} is not in the manifest, and would be loaded")
        return found

    def _open(self, name: str) -> MappedFile:
        path, entry = self.folder / safe_name(name), self.manifest.weight_files[name]
        file = MappedFile(path)
        if path.stat().st_size != entry.size:
            raise CheckpointError(f"{path} has another size than its manifest says")
        if bytes_blake3(file.header.raw) != entry.blake3:
            raise CheckpointError(f"{path}: the header was changed after it was written")
        return file

    def _check_slot(self, name: str, stored: StoredTensor) -> None:
        file = self._files.get(stored.file)
        slot = file.header.slots.get(name) if file else None
        if slot is None:
            raise CheckpointError(f"tensor {name} is not in {self.folder / stored.file}")
        if (slot.dtype, slot.shape) != (stored.dtype, stored.shape):
            raise CheckpointError(f"tensor {name} has another type or shape than the manifest says")

    def blake3(self, name: str, file: str) -> str:
        """BLAKE3 of the bytes of a stored tensor, as they are on disk now."""
        return self._files[file].blake3(name)

    def tensor_names(self, file: str) -> set[str]:
        """Names of all tensors in a weight file."""
        return set(self._files[file].header.slots)

    def drop_pages(self) -> None:
        """Gives the memory of all pages read so far back to the system; tensors stay valid."""
        for file in self._files.values():
            file.drop_pages()


class CheckpointReader(SealedFolder[Manifest]):
    """A finished checkpoint: its manifest, and its tensors as views of the mapped files.

    Opening it finds every structural damage, but does not read the tensors; checked.CheckedWeights
    does.
    """

    def __init__(self, folder: Path, check_files: bool = True) -> None:
        """Opens every weight file and holds its header against the manifest and its scheme.

        Args:
            folder: a finished checkpoint.
            check_files: also hash the small files beside the weight files.

        Raises:
            CheckpointError: naming the file or tensor that is missing or does not fit.
        """
        super().__init__(folder, Manifest.read(folder))
        for name, entry in self.manifest.linears.items():
            self._check_forms(name, entry)
        for problem in self.file_problems() if check_files else ():
            raise CheckpointError(f"{folder}: {problem}; {self.way_out}")

    @property
    def way_out(self) -> str:
        """What to do about a small file that is not as the manifest says."""
        return (
            f"put the original back, or take the files as they are now: "
            f"qwen3-ascend verify {self.folder} --accept"
        )

    def _check_forms(self, name: str, entry: LinearEntry) -> None:
        """Re-derives what a linear of this scheme and shape must be made of."""
        forms = stored_forms(entry.scheme, entry.shape, entry.layout, BIAS in entry.tensors)
        held = {
            suffix: Form(tensor.dtype, tensor.shape) for suffix, tensor in entry.tensors.items()
        }
        if held != forms:
            raise CheckpointError(
                f"linear {name}: the stored tensors are not those of a {entry.scheme} "
                f"{list(entry.shape)}"
            )

    @property
    def config(self) -> Qwen3Config:
        """Of the model."""
        return self.manifest.model

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
        return Linear(entry.scheme, entry.shape, entry.layout, tensors)
