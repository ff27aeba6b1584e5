"""The ATB door.

ATB is a C++ class interface, so its operators are replaced one level higher: at the dispatcher,
as kernels of torch.ops.atb.  A stand-in has the two phases of the aclnn door; device tensors
arrive as DeviceTensor, host tensors as a copy taken at the call, because ATB reads them then.
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


def _kernel(name: str, plan: Plan) -> Callable[..., torch.Tensor | None]:
    def call(*values: object, **named: object) -> torch.Tensor | None:
        faults.require_atb()
        arguments = [_argument(value) for value in values]
        faults.refuse(name, arguments)
        outcome = plan(*arguments, **{key: _argument(value) for key, value in named.items()})
        if isinstance(outcome, torch.Tensor):
            return outcome  # a question about workspace, answered without a launch
        trace.note(runtime.launch(name, outcome), "atb", name, arguments)
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
