"""The aclop door: one call by name, which the wheel still uses for format casts on 910B.

2.8 and 2.9 also fill and compare with it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence

from .. import nz, runtime, tensors, trace
from ..tensors import DeviceTensor

Compute = Callable[[list[DeviceTensor], list[DeviceTensor]], None]


def change_format(inputs: list[DeviceTensor], outputs: list[DeviceTensor]) -> None:
    """Equal logical values in another layout: what TransData and Identity do between formats."""
    source, target = inputs[0], outputs[0]
    if target.layout.nz and not source.layout.nz:
        target.blocks().copy_(nz.pack(source.blocks(), target.layout.storage_size[-1]))
    elif source.layout.nz and not target.layout.nz:
        target.blocks().copy_(nz.unpack(source.blocks(), *target.layout.storage_size[-2:]))
    else:
        target.blocks().copy_(source.blocks().reshape(target.layout.storage_size))


def ones_like(inputs: list[DeviceTensor], outputs: list[DeviceTensor]) -> None:
    outputs[0].view().fill_(1)


def not_equal(inputs: list[DeviceTensor], outputs: list[DeviceTensor]) -> None:
    outputs[0].write(inputs[0].read() != inputs[1].read())


OPERATORS: dict[str, Compute] = {
    "TransData": change_format,
    "Identity": change_format,
    "OnesLike": ones_like,
    "NotEqual": not_equal,
}


def _lacking(name: str) -> Compute:
    """On torch_npu's queue thread an error would end the thread: fail in the stream instead."""
    raise NotImplementedError(f"aclop {name} has no stand-in kernel in the simulator")


def _tensors(count: int, descriptions: Sequence[int], buffers: Sequence[int]) -> list[DeviceTensor]:
    return [tensors.from_acl_description(descriptions[i], buffers[i]) for i in range(count)]


def _plan_call(
    name: bytes,
    inputs: int,
    in_descriptions: Sequence[int],
    in_buffers: Sequence[int],
    outputs: int,
    out_descriptions: Sequence[int],
    out_buffers: Sequence[int],
) -> int:
    text = name.decode()
    compute = OPERATORS.get(text)
    if compute is None and os.environ["TASK_QUEUE_ENABLE"] == "0":
        runtime.library.sim_set_missing(name)
        return 0
    sources = _tensors(inputs, in_descriptions, in_buffers)
    targets = _tensors(outputs, out_descriptions, out_buffers)
    number = runtime.add_kernel(lambda: (compute or _lacking(text))(sources, targets))
    trace.note(number, "aclop", text, sources + targets)
    return number


_POINTERS = ctypes.POINTER(ctypes.c_void_p)
PlanCallback = ctypes.CFUNCTYPE(
    ctypes.c_int64,
    ctypes.c_char_p,
    ctypes.c_int,
    _POINTERS,
    _POINTERS,
    ctypes.c_int,
    _POINTERS,
    _POINTERS,
)


def install() -> None:
    callback = PlanCallback(_plan_call)
    runtime.keep_alive(callback)
    runtime.library.sim_set_aclop_callback(callback)
