"""The safetensors container, read and written in place.

The safetensors library writes whole dictionaries of tensors; a converter that must not hold a file
in memory needs the header first and then each tensor at its offset. The format is eight bytes of
little-endian header length, a JSON object, and the tensors' bytes without gaps. A header is
believed only after every statement in it has been checked against the file, before any allocation.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from qwen3_ascend.errors import CheckpointError
from qwen3_ascend.files.hashing import range_blake3
from qwen3_ascend.files.json_file import refuse_pointer

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself."""

METADATA = "__metadata__"
"""The entry of a header that is no tensor: text by key."""

HEADER_ALIGNMENT = 64
"""Headers are padded with spaces so that the first tensor starts on a cache line."""


@dataclass(frozen=True)
class Form:
    """What a tensor is without its data: its type and its shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the contiguous tensor."""
        return tensor_nbytes(self.dtype, self.shape)


@dataclass(frozen=True)
class TensorSlot:
    """Where one tensor lies: its type, shape and absolute byte range in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.stop - self.start


@dataclass(frozen=True)
class Header:
    """A checked header: the raw bytes before the first tensor, and the slots by name."""

    raw: bytes
    slots: Mapping[str, TensorSlot]


def tensor_nbytes(dtype: torch.dtype, shape: Iterable[int]) -> int:
    """Bytes of a contiguous tensor."""
    return math.prod(shape) * dtype.itemsize


def read_header(path: Path) -> Header:
    """Reads and checks the header of a file.

    Raises:
        CheckpointError: naming the file (and tensor) if it is missing, truncated, or if any
            statement of its header cannot be true.
    """
    refuse_pointer(path, CheckpointError)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path} is truncated or not a safetensors file "
                    f"({size} bytes, a header of {length} announced); download it again"
                )
            raw = file.read(length)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    slots = parse_header(raw, str(path))
    end = max((slot.stop for slot in slots.values()), default=8 + length)
    if end != size:
        state = "truncated" if end > size else "longer than its header says"
        raise CheckpointError(
            f"{path} is {state}: {size} bytes where {end} are expected; download it again"
        )
    return Header(length.to_bytes(8, "little") + raw, slots)


def parse_header(raw: bytes, where: str) -> dict[str, TensorSlot]:
    """The slots of a header's JSON, in file order; CheckpointError if it contradicts itself."""
    try:
        entries = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} has an unreadable safetensors header: {error}") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{where} has a safetensors header that is not an object")
    entries.pop(METADATA, None)
    return check_slots(entries, 8 + len(raw), where)


def check_slots(entries: Mapping[str, Any], base: int, where: str) -> dict[str, TensorSlot]:
    """The slots of a header's entries, in file order, for data that begins at byte `base`.

    Raises:
        CheckpointError: if an entry is malformed, or tensors overlap or leave gaps.
    """
    slots = {name: _slot(entry, base, name, where) for name, entry in entries.items()}
    ordered = dict(sorted(slots.items(), key=lambda item: (item[1].start, item[1].stop)))
    position = base
    for name, slot in ordered.items():
        if slot.start != position:
            raise CheckpointError(f"{where}: tensor {name} overlaps another or leaves a gap")
        position = slot.stop
    return ordered


def build_header(
    tensors: Mapping[str, Form], metadata: Mapping[str, str] = MappingProxyType({})
) -> Header:
    """The header of a file that holds these tensors, in this order, without gaps.

    Args:
        tensors: the form of each, by name.
        metadata: what else the header says.
    """
    entries: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    position = 0
    for name, form in tensors.items():
        stop = position + form.nbytes
        entries[name] = {
            "dtype": NAMES[form.dtype],
            "shape": list(form.shape),
            "data_offsets": [position, stop],
        }
        position = stop
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % HEADER_ALIGNMENT)
    return Header(len(text).to_bytes(8, "little") + text, parse_header(text, "new file"))


class MappedFile:
    """A safetensors file mapped into memory; its tensors alias the page cache.

    The mapping is private (copy on write), so that no tensor can change the file. Tensors keep the
    mapping alive.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = read_header(path)
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def tensor(self, name: str) -> Tensor:
        """The tensor of a name, in its stored shape; CheckpointError if there is none."""
        slot = self.header.slots.get(name)
        if slot is None:
            raise CheckpointError(f"{self.path} holds no tensor {name}")
        count = math.prod(slot.shape)
        if count == 0:
            return torch.empty(slot.shape, dtype=slot.dtype)
        flat = torch.frombuffer(self._map, dtype=slot.dtype, count=count, offset=slot.start)
        return flat.view(slot.shape)

    def blake3(self, name: str) -> str:
        """BLAKE3 of a tensor's bytes, read from the file again."""
        slot = self.header.slots[name]
        return range_blake3(self.path, slot.start, slot.stop)

    def raw(self, name: str) -> memoryview:
        """The bytes of a tensor."""
        slot = self.header.slots[name]
        return memoryview(self._map)[slot.start : slot.stop]

    def drop_pages(self) -> None:
        """Gives the memory of all pages read so far back to the system.

        Tensors stay valid: what is touched again comes from the page cache, or the disk.
        """
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        # Through ctypes, which lets other threads go on; mmap.madvise does not.
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(len(self._map)), mmap.MADV_DONTNEED)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} occurs twice")
    return found


def _slot(entry: Any, base: int, name: str, where: str) -> TensorSlot:
    try:
        dtype, shape, (start, stop) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        numbers = [*shape, start, stop]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: tensor {name} has an unreadable entry: {error}") from error
    if any(type(number) is not int or number < 0 for number in numbers):
        raise CheckpointError(f"{where}: tensor {name} has a shape or offset that is no count")
    if stop - start != tensor_nbytes(dtype, shape):
        raise CheckpointError(
            f"{where}: tensor {name} claims {stop - start} bytes for {entry['dtype']} {shape}"
        )
    return TensorSlot(dtype, tuple(shape), base + start, base + stop)
