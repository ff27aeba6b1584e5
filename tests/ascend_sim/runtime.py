"""The Python end of the simulated runtime: loading it, and the kernels it calls back.

A planned kernel is a closure with a number.  C keeps the number in a stream or in a captured
graph and calls `_run_kernel` when the kernel's turn comes; the closure then reads and writes
device memory, which is host memory, through the CPU tensors of raw.py.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path

KERNEL_FAILED = 507015  # what a card answers when an AI core reports an exception

library: ctypes.CDLL
operator_names: list[str] = []

_kernels: dict[int, Callable[[], None]] = {}
_numbers = itertools.count(1)
_callbacks: list[object] = []  # ctypes callbacks must outlive their use
_guards: tuple[Callable[..., object], ...] = ()

RunCallback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int64, ctypes.c_int)
DropCallback = ctypes.CFUNCTYPE(None, ctypes.c_int64)


def load(folder: Path, with_atb: bool = True) -> None:
    """Maps the stand-in libraries, so that the wheel finds their names already loaded."""
    global library
    library = ctypes.CDLL(str(folder / "libascendcl.so"), ctypes.RTLD_GLOBAL)
    for path in sorted(folder.glob("*.so")):
        if with_atb or path.name != "libatb.so":
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    _declare(library)
    operators = ctypes.CDLL(str(folder / "libopapi.so"))
    array = (ctypes.c_char_p * 4096).in_dll(operators, "sim_operator_names")
    operator_names.extend(name.decode() for name in itertools.takewhile(bool, array))
    register_callback(RunCallback(_run_kernel), DropCallback(_drop_kernel))


def _declare(lib: ctypes.CDLL) -> None:
    lib.sim_device_bytes.restype = lib.sim_device_peak.restype = ctypes.c_size_t
    lib.sim_free_counter.restype = ctypes.POINTER(ctypes.c_uint64)
    lib.sim_is_device.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    lib.sim_launch.argtypes = (
        ctypes.c_void_p,
        ctypes.c_char_p,
        ctypes.c_int64,
        ctypes.c_int64,
    )
    lib.sim_register_operator.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int)
    lib.sim_plan_needs.argtypes = (ctypes.c_int64, ctypes.c_int64)
    lib.sim_poison_reused.argtypes = (ctypes.c_void_p,)
    lib.sim_take_missing.restype = ctypes.c_char_p
    lib.sim_log_size.restype = ctypes.c_int64
    lib.sim_log_entries.restype = ctypes.c_void_p
    lib.aclGetRecentErrMsg.restype = ctypes.c_char_p


def register_callback(run: object, drop: object) -> None:
    _callbacks.extend((run, drop))
    library.sim_set_callbacks(run, drop)


def keep_alive(callback: object) -> None:
    _callbacks.append(callback)


def after_torch_import() -> None:
    """Kernels run inside whatever torch is doing; these guards make that invisible to them."""
    global _guards
    import torch

    _guards = (
        torch._C._AutoDispatchBelowAutograd,
        torch._C._DisableTorchDispatch,
        torch.inference_mode,  # whose views may be written whoever made them
    )
    if os.environ["TASK_QUEUE_ENABLE"] != "0":
        # Kernels then run on torch_npu's queue thread, which needs Python's lock.  The default
        # interval of 5 ms for handing it over would be the time of every launch.
        sys.setswitchinterval(1e-5)


# -------------------------------------------------------------------------------- kernels
def add_kernel(run: Callable[[], None]) -> int:
    number = next(_numbers)
    _kernels[number] = run
    return number


def _run_kernel(number: int, keep: int) -> int:
    run = _kernels[number] if keep else _kernels.pop(number)
    try:
        with _guards[0](), _guards[1](), _guards[2]():
            run()
        return 0
    except Exception as error:
        set_error(f"a kernel failed on the device: {type(error).__name__}: {error}")
        return KERNEL_FAILED


def _drop_kernel(number: int) -> None:
    _kernels.pop(number, None)


def set_error(message: str) -> None:
    """What torch_npu's next exception will quote."""
    library.sim_set_error(message[:480].encode())


def flush_queue() -> None:
    """Waits until torch_npu's own task queue has handed everything to the streams."""
    import torch

    if os.environ["TASK_QUEUE_ENABLE"] != "0" and torch.npu.is_initialized():
        _ = torch.npu.current_stream().npu_stream  # reading the raw handle empties the queue


def poison_reused_memory() -> None:
    """Memory that torch_npu's allocator hands out again is NaN, as fresh memory is."""
    import torch_npu

    folder = Path(torch_npu.__file__).parent
    wheel = ctypes.CDLL(str(folder / "lib" / "libtorch_npu.so"))
    allocator = ctypes.c_void_p.in_dll(wheel, "_ZN7c10_npu19NPUCachingAllocator9allocatorE")
    library.sim_poison_reused(allocator)


def launch(name: str, run: Callable[[], None], hidden_copies: int = 0) -> int:
    """Puts a kernel on the current stream, for doors that are not ACL calls."""
    import torch

    stream = torch.npu.current_stream().npu_stream  # also empties torch_npu's own task queue
    number = add_kernel(run)
    error = library.sim_launch(stream, name.encode(), number, hidden_copies)
    if error:
        raise RuntimeError(f"{name}: {library.aclGetRecentErrMsg().decode()} (error {error})")
    return number
