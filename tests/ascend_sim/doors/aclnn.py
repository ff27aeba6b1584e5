"""The aclnn door: op-plugin's C++ calls aclnnXxxGetWorkspaceSize, then aclnnXxx.

A stand-in is a function that takes the decoded arguments, checks them (the first phase, where a
card refuses), and returns the closure that computes (the second phase).  Its signature names the
arguments in the order of the C call, each with a kind:

    T tensor    L tensor list    S scalar    I integer array    B boolean array
    i integer   b boolean        d double    f float            s string    y dtype

    @aclnn("aclnnRmsNorm", "x:T gamma:T epsilon:d y:T rstd:T")
    def rms_norm(x, gamma, epsilon, y, rstd): ...
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .. import faults, runtime, tensors, trace

Plan = Callable[..., Callable[[], None]]
FLOAT_KINDS = frozenset("df")


def _boolean(value: int) -> bool:
    return bool(value & 1)


def _string(address: int) -> str | None:
    return ctypes.string_at(address).decode() if address else None


def _tensor_list(address: int) -> list[tensors.DeviceTensor | None] | None:
    if not address:
        return None
    return [tensors.from_acl_tensor(item) for item in tensors.list_elements(address, "Q")]


def _integer_list(address: int) -> list[int] | None:
    return tensors.list_elements(address, "q") if address else None


def _boolean_list(address: int) -> list[bool] | None:
    return tensors.bool_elements(address) if address else None


def _single(value: float) -> float:
    """A C float in the low half of its register."""
    return ctypes.c_float.from_buffer(ctypes.c_double(value)).value


Decoder = Callable[[Any], object]

DECODERS: dict[str, Decoder] = {
    "T": tensors.from_acl_tensor,
    "L": _tensor_list,
    "S": tensors.scalar,
    "I": _integer_list,
    "B": _boolean_list,
    "i": int,
    "b": _boolean,
    "d": float,
    "f": _single,
    "s": _string,
    "y": lambda value: tensors.dtypes.get(value & 0xFFFFFFFF),
}


Workspace = Callable[..., int]
"""Bytes of scratch memory for a call, from its arguments; with `largest=True` for the lengths that
need most, which is what GetMaxWorkspaceSize answers."""


@dataclass(frozen=True)
class StandIn:
    name: str
    plan: Plan
    decoders: tuple[
        tuple[bool, Callable[[Any], object]], ...
    ]  # (comes from the float registers, decoder)
    integers: int
    workspace: Workspace | None


_pending: dict[str, StandIn] = {}
_stand_ins: dict[int, StandIn] = {}


def aclnn(name: str, signature: str, workspace: Workspace | None = None) -> Callable[[Plan], Plan]:
    """Registers a stand-in; `workspace` tells what the operator asks for, None for nothing."""
    kinds = [part.split(":")[1] for part in signature.split()]
    decoders = tuple((kind in FLOAT_KINDS, DECODERS[kind]) for kind in kinds)
    integers = sum(kind not in FLOAT_KINDS for kind in kinds)

    def register(plan: Plan) -> Plan:
        _pending[name] = StandIn(name, plan, decoders, integers, workspace)
        return plan

    return register


def _decode(stand_in: StandIn, integers: Sequence[int], floats: Sequence[float]) -> list[object]:
    values: Iterator[float] = iter(integers[: stand_in.integers])
    singles = iter(floats[:8])
    return [
        decode(next(singles if from_floats else values))
        for from_floats, decode in stand_in.decoders
    ]


READS_STRIDES = frozenset(("aclnnInplaceCopy",))
"""Operators that are such a copy themselves."""


def _hidden_copies(name: str, arguments: list[object]) -> int:
    """Strided arguments, each of which costs a kernel of its own (AutoContiguous of the operator
    definitions, l0op::Contiguous and ViewCopy of the aclnn layer).  Matrices read as transposed
    views cost none; tensors in lists are not counted."""
    if name in READS_STRIDES:
        return 0
    layouts = [each.layout for each in arguments if isinstance(each, tensors.DeviceTensor)]
    return sum(not (each.contiguous or each.transposed or each.nz) for each in layouts)


def _plan_call(
    index: int, only_workspace: int, integers: Sequence[int], floats: Sequence[float]
) -> int:
    """The number of the planned kernel, 0 for a refusal."""
    stand_in = _stand_ins[index]
    try:
        arguments = _decode(stand_in, integers, floats)
        if only_workspace:
            assert stand_in.workspace is not None  # C asks for nothing else
            runtime.library.sim_plan_needs(stand_in.workspace(*arguments, largest=True), 0)
            return 1
        faults.refuse(stand_in.name, arguments)
        number = runtime.add_kernel(stand_in.plan(*arguments))
        copies = _hidden_copies(stand_in.name, arguments)
        trace.note(number, "aclnn", stand_in.name, arguments, copies)
        if copies or stand_in.workspace:
            needed = stand_in.workspace(*arguments) if stand_in.workspace else 0
            runtime.library.sim_plan_needs(needed, copies)
        return number
    except Exception as error:
        runtime.set_error(f"{stand_in.name}: {error}")
        return 0


PlanCallback = ctypes.CFUNCTYPE(
    ctypes.c_int64,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.POINTER(ctypes.c_int64),
    ctypes.POINTER(ctypes.c_double),
)


def install() -> None:
    numbers = {name: number for number, name in enumerate(runtime.operator_names)}
    for name, stand_in in _pending.items():
        if name in numbers:
            _stand_ins[numbers[name]] = stand_in
            runtime.library.sim_register_operator(
                numbers[name], stand_in.integers, stand_in.workspace is not None
            )
    callback = PlanCallback(_plan_call)
    runtime.keep_alive(callback)
    runtime.library.sim_set_plan_callback(callback)


def names() -> list[str]:
    return sorted(stand_in.name for stand_in in _stand_ins.values())
