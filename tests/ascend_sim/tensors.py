"""Tensor arguments as the runtime describes them: a layout, which is interned, and a pointer."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

from . import nz, raw
from .limits import Refused

if TYPE_CHECKING:
    import torch

MAX_DIMS = 8
DIMS_FIELD, VIEW_FIELD = 1, 6  # places in the aclTensor of tensors.c, counted in int64
# Formats that are plain strided memory: undefined, NCHW, NHWC, ND, NCDHW, NC, NCL.
PLAIN_FORMATS = frozenset((-1, 0, 1, 2, 30, 35, 47))
_ACL_DTYPES = {
    0: "float32",
    1: "float16",
    2: "int8",
    3: "int32",
    4: "uint8",
    6: "int16",
    7: "uint16",
    8: "uint32",
    9: "int64",
    10: "uint64",
    11: "float64",
    12: "bool",
    16: "complex64",
    17: "complex128",
    27: "bfloat16",
}
dtypes: dict[int, torch.dtype] = {}


def after_torch_import() -> None:
    import torch

    dtypes.update({number: getattr(torch, name) for number, name in _ACL_DTYPES.items()})


def row_major(size: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(size[i + 1 :]) for i in range(len(size)))


@dataclass(frozen=True, eq=False)  # interned below, so identity is equality and hashing is cheap
class Layout:
    """Everything about a tensor argument except where it lies."""

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0
    format: int = 2
    storage_size: tuple[int, ...] = ()

    @cached_property
    def nz(self) -> bool:
        return self.format == nz.FORMAT

    @cached_property
    def dims(self) -> int:
        return len(self.size)

    @cached_property
    def elements(self) -> int:
        return prod(self.size)

    @cached_property
    def contiguous(self) -> bool:
        wanted = row_major(self.size)
        return all(
            n == 1 or have == want
            for n, have, want in zip(self.size, self.stride, wanted, strict=True)
        )

    @cached_property
    def transposed(self) -> bool:
        """A view whose last two dimensions were swapped, which is how NZ weights are used."""
        return self.dims >= 2 and self.stride[-2] == 1 and self.stride[-1] >= self.size[-2] > 1

    def __str__(self) -> str:
        suffix = "" if self.format in PLAIN_FORMATS else f" format {self.format}"
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.size)}{suffix}"


_interned: dict[object, Layout] = {}


def intern(key: object, *fields: Any) -> Layout:
    layout = _interned.get(key)
    if layout is None:
        layout = _interned[key] = Layout(*fields)
    return layout


class DeviceTensor:
    """One tensor argument.  read() gives logical values, write() stores them in its format."""

    __slots__ = ("layout", "pointer")

    def __init__(self, layout: Layout, pointer: int) -> None:
        self.layout = layout
        self.pointer = pointer

    def view(self) -> torch.Tensor:
        """The memory itself, for plain formats."""
        layout = self.layout
        if layout.format not in PLAIN_FORMATS:
            raise Refused(f"a tensor in format {layout.format} has no plain view")
        return raw.view(self.pointer, layout.dtype, layout.size, layout.stride, layout.offset)

    def blocks(self) -> torch.Tensor:
        """The storage in the order of its bytes, which for NZ are the tiles."""
        size = self.layout.storage_size
        return raw.view(self.pointer, self.layout.dtype, size, row_major(size))

    def read(self) -> torch.Tensor:
        layout = self.layout
        if not layout.nz:
            return self.view()
        if layout.transposed:
            return nz.unpack(self.blocks(), layout.size[-1], layout.size[-2]).mT
        return nz.unpack(self.blocks(), *layout.size[-2:])

    def write(self, values: torch.Tensor) -> None:
        if self.layout.nz:
            self.blocks().copy_(nz.pack(values.to(self.layout.dtype), self.layout.storage_size[-1]))
            return
        target = self.view()
        if values.shape != target.shape and values.numel() == target.numel():
            values = values.reshape(target.shape)
        target.copy_(values)

    def __repr__(self) -> str:
        return str(self.layout)


def of(tensor: torch.Tensor) -> DeviceTensor:
    """The description of a torch tensor on the device, for doors that are given torch tensors."""
    import torch_npu

    format_number = int(torch_npu.get_npu_format(tensor)) if tensor.numel() else 2
    shape = tuple(tensor.shape)
    storage = nz.storage_shape(shape, tensor.dtype) if format_number == nz.FORMAT else shape
    fields = (tensor.dtype, shape, tensor.stride(), tensor.storage_offset(), format_number, storage)
    return DeviceTensor(intern(fields, *fields), tensor.untyped_storage().data_ptr())


# ------------------------------------------------------- reading the structures of tensors.c
_TENSOR = struct.Struct(f"={5 + 3 * MAX_DIMS}q")
_TENSOR_BYTES = 8 + _TENSOR.size
_DESCRIPTION = struct.Struct(f"={5 + 2 * MAX_DIMS}q")
_LIST = struct.Struct("=2q")


def from_acl_tensor(address: int) -> DeviceTensor | None:
    if not address:
        return None
    data = ctypes.string_at(address, _TENSOR_BYTES)
    key = data[8:]
    layout = _interned.get(key) or _intern_acl_tensor(key)
    return DeviceTensor(layout, int.from_bytes(data[:8], "little"))


def _intern_acl_tensor(key: bytes) -> Layout:
    dims, storage_dims, dtype, format_number, offset, *rest = _TENSOR.unpack(key)
    size, stride, storage = rest[:8], rest[8:16], rest[16:]
    return intern(
        key,
        dtypes[dtype],
        tuple(size[:dims]),
        tuple(stride[:dims]),
        offset,
        format_number,
        tuple(storage[:storage_dims]),
    )


def from_acl_description(description: int, buffer: int) -> DeviceTensor:
    key = ctypes.string_at(description, _DESCRIPTION.size)
    layout = _interned.get(key)
    if layout is None:
        dtype, dims, _, storage_dims, storage_format, *rest = _DESCRIPTION.unpack(key)
        size, storage = tuple(rest[:dims]), tuple(rest[8 : 8 + storage_dims])
        stride = row_major(size)
        layout = intern(key, dtypes[dtype], size, stride, 0, storage_format, storage)
    pointer = int.from_bytes(ctypes.string_at(buffer, 8), "little")
    return DeviceTensor(layout, pointer)


def list_elements(address: int, letter: str) -> list[int]:
    """The raw 64-bit elements of an aclIntArray ("q") or a list of pointers ("Q")."""
    data, count = _LIST.unpack(ctypes.string_at(address, 16))
    return (
        list(struct.unpack(f"={count}{letter}", ctypes.string_at(data, 8 * count))) if count else []
    )


def bool_elements(address: int) -> list[bool]:
    data, count = _LIST.unpack(ctypes.string_at(address, 16))
    return [byte != 0 for byte in ctypes.string_at(data, count)] if count else []


def scalar(address: int) -> float | int | bool | None:
    import torch

    if not address:
        return None
    data = ctypes.string_at(address, 24)
    dtype = dtypes[int.from_bytes(data[:8], "little")]
    return torch.frombuffer(bytearray(data[8:]), dtype=dtype, count=1)[0].item()
