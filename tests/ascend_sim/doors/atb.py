"""The ATB door.

ATB is a C++ class interface, so its operators are replaced one level higher: at the dispatcher,
as kernels of torch.ops.atb.  A stand-in has the two phases of the aclnn door; device tensors
arrive as DeviceTensor, host tensors as a copy taken at the call, because ATB reads them then.

op-plugin makes every input contiguous before ATB sees it (ParamSetter::Input in AtbCommon.cpp), so
a strided input is no error: it costs a copy, which the trace tells.  What an operator writes goes
to ATB as it is: a stand-in has to refuse strides there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import faults, runtime, tensors, trace

Plan = Callable[..., Callable[[], None] | torch.Tensor]
_stand_ins: dict[str, Plan] = {}
_libraries: list[torch.library.Library] = []


def atb(name: str) -> Callable[[Plan], Plan]:
    def register(plan: Plan) -> Plan:
        _stand_ins[name] = plan
        return plan

    return register


def _argument(value: object) -> object:
    if not isinstance(value, torch.Tensor):
        return value
    return tensors.of(value) if value.device.type == "npu" else value.detach().clone()


def _copies(arguments: list[object]) -> int:
    """Unlike an aclnn operator, op-plugin copies a transposed view too."""
    layouts = [each.layout for each in arguments if isinstance(each, tensors.DeviceTensor)]
    return sum(not each.contiguous for each in layouts)


def _kernel(name: str, plan: Plan) -> Callable[..., torch.Tensor | None]:
    def call(*values: object, **named: object) -> torch.Tensor | None:
        faults.require_atb()
        arguments = [_argument(value) for value in values]
        faults.refuse(name, arguments)
        outcome = plan(*arguments, **{key: _argument(value) for key, value in named.items()})
        if isinstance(outcome, torch.Tensor):
            return outcome  # a question about workspace, answered without a launch
        copies = _copies(arguments)
        trace.note(runtime.launch(name, outcome, copies), "atb", name, arguments, copies)
        return None

    return call


def install() -> None:
    """Does nothing when the wheel could not load its ATB library (no libatb.so)."""
    if not hasattr(torch.ops.atb, "_npu_paged_attention"):
        return
    library = torch.library.Library("atb", "IMPL")
    for name, plan in _stand_ins.items():
        library.impl(name, _kernel(name, plan), "PrivateUse1", allow_override=True)
    _libraries.append(library)


def names() -> list[str]:
    return sorted(_stand_ins)
