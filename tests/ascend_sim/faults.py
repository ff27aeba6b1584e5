"""Planted faults: devices that are broken in a way a loader or a backend must notice.

Switches that change the machine itself are read once, from the environment (see README): no
device, no ATB library, another SoC, less memory.  The ones here can be set inside a test.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from . import nz, runtime

_without_atb = False


def require_atb() -> None:
    """Raises what the wheel raises.  It means to add a hint to source set_env.sh, but with this
    version of torch the text it looks for is not in the exception, and its message stays empty:
    test_faults.py compares the two."""
    if _without_atb:
        raise OSError(None, "")


@contextlib.contextmanager
def without_atb() -> Iterator[None]:
    """Every ATB operator raises what the wheel raises on a machine without NNAL."""
    global _without_atb
    _without_atb = True
    try:
        yield
    finally:
        _without_atb = False


@contextlib.contextmanager
def nd_instead_of_nz() -> Iterator[None]:
    """empty_with_format and npu_format_cast hand out ND whatever was asked for."""
    import torch_npu

    originals = {
        name: getattr(torch_npu, name) for name in ("empty_with_format", "npu_format_cast")
    }
    empty, cast = originals.values()
    torch_npu.empty_with_format = lambda *args, acl_format=2, **kw: empty(*args, acl_format=2, **kw)
    torch_npu.npu_format_cast = lambda tensor, acl_format, *args, **kw: cast(tensor, 2, *args, **kw)
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(torch_npu, name, function)


@contextlib.contextmanager
def transposed_nz_tiles() -> Iterator[None]:
    """A device whose FRACTAL_NZ has another order of bytes than the file says."""
    nz.transposed_tiles = True
    try:
        yield
    finally:
        nz.transposed_tiles = False


@contextlib.contextmanager
def failing_copies(count: int = 1) -> Iterator[None]:
    """The next `count` memory copies return an error code."""
    runtime.library.sim_fail_copies(count)
    try:
        yield
    finally:
        runtime.library.sim_fail_copies(0)
