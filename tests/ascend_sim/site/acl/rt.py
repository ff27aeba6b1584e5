"""`acl.rt` over the simulated runtime."""

from __future__ import annotations

import ctypes

_COPY = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def memcpy(destination: int, room: int, source: int, count: int, kind: int) -> int:
    """aclrtMemcpy: `count` bytes between two addresses. `kind` is 0 host to host, 1 host to device,
    2 device to host, 3 device to device. Returns 0 or the error of the runtime."""
    copy = ctypes.CDLL("libascendcl.so").aclrtMemcpy  # mapped by ascend_sim.install()
    copy.argtypes = _COPY
    return int(copy(destination, room, source, count, kind))
