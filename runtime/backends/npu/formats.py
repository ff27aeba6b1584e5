"""FRACTAL_NZ tensors on the device: made by plain copies of the file's bytes, and checked.

Recipe R1: allocate an empty tensor whose storage is FRACTAL_NZ, make sure that it is, and copy the
stored bytes into the storage. No cast kernel runs and no second copy of the weight ever exists.
`tensor.copy_` cannot be used: it allocates ND, uploads, and casts on the device (torch_npu
csrc/aten/common/CopyKernel.cpp).
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
import torch_npu
from torch import Tensor

from qwen3_ascend.checkpoint.layout import Layout
from qwen3_ascend.errors import DeviceError
from qwen3_ascend.runtime.backends.npu.transfers import copy_now

ACL_FORMAT_ND = 2
ACL_FORMAT_FRACTAL_NZ = 29
"""Values of aclFormat in CANN's acl_base.h."""

DEVICE_TO_HOST = 2
"""Value of aclrtMemcpyKind in CANN's acl_rt.h."""


class FormatError(DeviceError):
    """The device did not give a tensor the format it was asked for."""


def upload_packed(
    stored: Tensor,
    layout: Layout,
    outputs: int,
    inputs: int,
    copy: Callable[[Tensor, Tensor], None] = copy_now,
) -> Tensor:
    """Puts a stored weight on the device without changing a byte.

    Args:
        stored: CPU tensor in the layout's storage shape; batch axes, such as experts, come first.
        layout: "nz" or "nd", of [K, N] or [N, K].
        outputs, inputs: N and K.
        copy: takes the device tensor and the bytes for its storage.

    Returns:
        A tensor of logical shape [*batch, K, N] or [*batch, N, K], as the layout says, with a
        column for each word; FRACTAL_NZ if the layout is nz.

    Raises:
        FormatError: self-check S0: the storage is not FRACTAL_NZ of exactly these bytes.
        DeviceError: if the copy fails.
    """
    if layout.format == "nd":
        plain = torch.empty(stored.shape, dtype=stored.dtype, device="npu")
        copy(plain, stored.contiguous())
        return plain
    batch = stored.shape[: -len(layout.storage_shape((outputs, inputs)))]
    tensor = empty_packed(stored.dtype, layout, outputs, inputs, batch)
    fill_packed(tensor, stored, copy)
    return tensor


def empty_packed(
    dtype: torch.dtype, layout: Layout, outputs: int, inputs: int, batch: Sequence[int] = ()
) -> Tensor:
    """An unfilled device tensor [*batch, K, N] or [*batch, N, K], with a column for each word,
    whose storage is FRACTAL_NZ.

    torch_npu's own strips of int32 are 64 bytes wide, so words are made as bytes and viewed, as
    vllm-ascend views int4 weights (methods/w4a8.py).
    """
    rows, columns = (inputs, outputs) if layout.nz_of == "KN" else (outputs, inputs)
    words = -(-columns // layout.per_word)
    made = torch.int8 if layout.per_word > 1 else dtype
    tensor: Tensor = torch_npu.empty_with_format(
        (*batch, rows, words * (dtype.itemsize // made.itemsize)),
        dtype=made,
        device="npu",
        acl_format=ACL_FORMAT_FRACTAL_NZ,
    )
    return tensor.view(dtype)


def fill_packed(tensor: Tensor, stored: Tensor, copy: Callable[[Tensor, Tensor], None]) -> None:
    """Copies a stored weight into the storage of a tensor of `empty_packed`, as it is.

    Raises:
        FormatError: self-check S0: the storage is not FRACTAL_NZ of exactly these bytes.
        DeviceError: if the copy fails.
    """
    _check_storage(tensor, stored)
    copy(tensor, stored.contiguous())


def upload_by_cast(stored: Tensor, layout: Layout, outputs: int, inputs: int) -> Tensor:
    """Recipe R5, the fallback: unpack on the host, upload ND, cast on the device.

    Twice the memory for a moment, and one cast for each weight. Where the device answers with ND
    (a chip without FRACTAL_NZ), the ND tensor is used. Words of int4, which no cast knows, stay ND.
    """
    if layout.per_word > 1:
        by_row = dataclasses.replace(layout, format="nd", c0=0)
        return by_row.pack(layout.unpack(stored, (outputs, inputs))).to("npu")
    plain = layout.unpack(stored, (outputs, inputs))
    turned = layout.nz_of == "KN" and layout.format == "nz"
    matrix = plain.transpose(-2, -1).contiguous() if turned else plain
    tensor = matrix.to("npu")
    if layout.format == "nd":
        return tensor
    return torch_npu.npu_format_cast(tensor, ACL_FORMAT_FRACTAL_NZ)


def raw_bytes(tensor: Tensor) -> Tensor:
    """The storage of a device tensor as it lies there, uint8 on the CPU."""
    torch_npu.npu.synchronize()
    storage = tensor.untyped_storage()
    host = torch.empty(storage.nbytes(), dtype=torch.uint8)
    _copy(host.data_ptr(), storage.data_ptr(), storage.nbytes(), DEVICE_TO_HOST)
    return host


def format_of(tensor: Tensor) -> int:
    """The ACL format of a device tensor."""
    return int(torch_npu.get_npu_format(tensor))


def cast_to_nd(tensor: Tensor) -> Tensor:
    """A FRACTAL_NZ tensor as the device itself reads it, in plain order."""
    return torch_npu.npu_format_cast(tensor, ACL_FORMAT_ND)


def cast_to_nz(tensor: Tensor) -> Tensor:
    """A plain tensor as the device itself lays it out."""
    return torch_npu.npu_format_cast(tensor.contiguous(), ACL_FORMAT_FRACTAL_NZ)


def _check_storage(tensor: Tensor, stored: Tensor) -> None:
    held, wanted = format_of(tensor), stored.nbytes
    nbytes, offset = tensor.untyped_storage().nbytes(), tensor.storage_offset()
    if held != ACL_FORMAT_FRACTAL_NZ:
        raise FormatError(f"the device allocated ACL format {held}, not FRACTAL_NZ")
    if (nbytes, offset) != (wanted, 0):
        raise FormatError(
            f"a FRACTAL_NZ {list(tensor.shape)} takes {nbytes} bytes at offset {offset} on this "
            f"device, but the file holds {wanted}"
        )


@functools.cache
def _memcpy() -> Callable[..., int]:
    """aclrtMemcpy(dst, dst_size, src, count, kind) -> 0; from the library torch_npu has loaded."""
    function = ctypes.CDLL("libascendcl.so").aclrtMemcpy
    function.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int,
    ]  # fmt: skip
    function.restype = ctypes.c_int
    return function


def _copy(target: int, source: int, nbytes: int, kind: int) -> None:
    code = _memcpy()(target, nbytes, source, nbytes, kind)
    if code:
        raise DeviceError(f"aclrtMemcpy of {nbytes} bytes failed with error {code}")
