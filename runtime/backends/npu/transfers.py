"""Bytes of mapped files to the device: through pinned buffers, on the stream that will use them.

A plain copy from pageable memory makes the driver stage it and the host wait for it. Here two
threads fill pinned buffers, which is where pages of the file are read, while earlier buffers are on
their way; the copies stand in stream order, so that no kernel sees a weight before its bytes.
"""

from __future__ import annotations

import ctypes
import functools
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch_npu
from torch import Tensor

from qwen3_ascend.errors import DeviceError

BUFFER_BYTES = 8 << 20
BUFFERS = 4
"""Two that are filled and two on their way; together 32 MiB of pinned memory."""

FILLERS = 2
"""Threads: one cannot fill as fast as a card reads."""

HOST_TO_DEVICE = 1
"""Value of aclrtMemcpyKind in CANN's acl_rt.h."""


@dataclass
class _Buffer:
    """Pinned memory, and the event after its last copy."""

    memory: Tensor
    event: Any

    def fill(self, source: Tensor) -> None:
        """Takes bytes of the host."""
        with torch.inference_mode():  # of this thread: the memory may have been made inside it
            self.memory[: source.numel()].copy_(source)


def copy_now(target: Tensor, source: Tensor) -> None:
    """`Transfers.copy`, of one tensor alone."""
    transfers = Transfers()
    try:
        transfers.copy(target, source)
    finally:
        transfers.finish()


class Transfers:
    """Copies into the storage of device tensors; each byte once, none changed."""

    def __init__(self) -> None:
        self._buffers: deque[_Buffer] = deque()
        self._fillers: ThreadPoolExecutor | None = None

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Fills the storage of a device tensor; the source may change once this returns.

        Args:
            target: its storage has as many bytes as the source.
            source: contiguous, on the CPU.

        Raises:
            DeviceError: if a copy is refused.
        """
        data = source.reshape(-1).view(torch.uint8)
        stream = torch_npu.npu.current_stream()
        # The handle is given out when all that was queued before is on the stream.
        handle, address = stream.npu_stream, target.untyped_storage().data_ptr()
        under_way: deque[tuple[Future[None], _Buffer, int, int]] = deque()
        for start in range(0, data.numel(), BUFFER_BYTES):
            if len(under_way) == FILLERS:
                self._send(*under_way.popleft(), handle, stream)
            piece, buffer = data[start : start + BUFFER_BYTES], self._buffer()
            filling = self._pool().submit(buffer.fill, piece)
            under_way.append((filling, buffer, address + start, piece.numel()))
        while under_way:
            self._send(*under_way.popleft(), handle, stream)

    def finish(self) -> None:
        """Waits for all copies, and gives threads and pinned memory back."""
        for buffer in self._buffers:
            buffer.event.synchronize()
        self._buffers.clear()
        if self._fillers is not None:
            self._fillers.shutdown()
            self._fillers = None

    def _send(
        self,
        filling: Future[None],
        buffer: _Buffer,
        address: int,
        nbytes: int,
        handle: int,
        stream: Any,
    ) -> None:
        filling.result()
        try:
            source = buffer.memory.data_ptr()
            code = _memcpy_async()(address, nbytes, source, nbytes, HOST_TO_DEVICE, handle)
            if code:
                raise DeviceError(f"aclrtMemcpyAsync of {nbytes} bytes failed with error {code}")
            buffer.event.record(stream)
        finally:
            self._buffers.append(buffer)

    def _buffer(self) -> _Buffer:
        """The buffer that was sent first, or a new one."""
        if len(self._buffers) >= BUFFERS - FILLERS:
            buffer = self._buffers.popleft()
            buffer.event.synchronize()
            return buffer
        memory = torch.empty(BUFFER_BYTES, dtype=torch.uint8).pin_memory()
        return _Buffer(memory, torch_npu.npu.Event())

    def _pool(self) -> ThreadPoolExecutor:
        if self._fillers is None:
            self._fillers = ThreadPoolExecutor(FILLERS, "weights to pinned memory")
        return self._fillers


@functools.cache
def _memcpy_async() -> Callable[..., int]:
    """aclrtMemcpyAsync(dst, dst_size, src, count, kind, stream) -> 0; see acl_rt.h."""
    function = ctypes.CDLL("libascendcl.so").aclrtMemcpyAsync
    function.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int,
        ctypes.c_void_p,
    ]  # fmt: skip
    function.restype = ctypes.c_int
    return function
