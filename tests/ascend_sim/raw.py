"""Device memory seen as CPU tensors that own nothing."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from . import runtime

if TYPE_CHECKING:
    import torch

_views: dict[tuple[object, ...], torch.Tensor] = {}
_frees_seen = 0


def bytes_at(pointer: int, count: int) -> torch.Tensor:
    """`count` bytes of device or host memory as a uint8 tensor."""
    import torch

    if count == 0:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer((ctypes.c_char * count).from_address(pointer), dtype=torch.uint8)


def storage_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor's storage as they lie on the device, whatever its format."""
    storage = tensor.untyped_storage()
    return bytes_at(storage.data_ptr(), storage.nbytes())


def view(
    pointer: int,
    dtype: torch.dtype,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    offset: int = 0,
) -> torch.Tensor:
    """A strided CPU view of device memory.  Views are cached until a device block is freed."""
    global _frees_seen
    frees = runtime.library.sim_free_counter()[0]
    if frees != _frees_seen or len(_views) > 100_000:
        _views.clear()
        _frees_seen = frees
    key = (pointer, dtype, size, stride, offset)
    found = _views.get(key)
    if found is None:
        found = _views[key] = _make_view(*key)
    return found


def _make_view(
    pointer: int, dtype: torch.dtype, size: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> torch.Tensor:
    import torch

    if 0 in size:
        return torch.empty(size, dtype=dtype)
    span = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
    count = span * dtype.itemsize
    if not runtime.library.sim_is_device(pointer, count):
        raise RuntimeError(f"{count} bytes at {pointer:#x} do not lie inside one device block")
    return torch.as_strided(bytes_at(pointer, count).view(dtype), size, stride, offset)
