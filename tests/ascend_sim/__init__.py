"""A simulated Ascend device under the real, unmodified torch_npu wheel.

    import ascend_sim
    ascend_sim.install()          # before anything imports torch

See README.md for what this proves and what it cannot.
"""

from __future__ import annotations

import atexit
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from . import cann, faults, raw, runtime, tensors, trace
from .limits import Refused, soc
from .trace import Kind, TraceEntry

__all__ = [
    "Kind",
    "MemoryStatistics",
    "Refused",
    "TraceEntry",
    "abandon_pending",
    "cann",
    "faults",
    "install",
    "installed",
    "memory_statistics",
    "operators",
    "raw",
    "reset_peak",
    "reset_trace",
    "set_strict",
    "trace",
    "trace_entries",
]

_installed = False


@dataclass(frozen=True)
class MemoryStatistics:
    """Bytes of device blocks, as the runtime handed them out (torch_npu's allocator asks for
    blocks of 2 MiB and more; torch.npu.memory_allocated() counts tensors)."""

    current: int
    peak: int


def installed() -> bool:
    return _installed


def install() -> None:
    """Maps the stand-in libraries, imports torch and torch_npu, registers all kernels."""
    global _installed
    if _installed:
        return
    if "torch_npu" in sys.modules:
        raise RuntimeError("ascend_sim.install() must run before torch_npu is imported")
    from .build import libraries

    os.environ.setdefault("TASK_QUEUE_ENABLE", "0")
    planted = [name for name in os.environ.get("ASCEND_SIM_FAULTS", "").split(",") if name]
    runtime.load(libraries(), with_atb="no_atb" not in planted)

    # Imported for their effect, in the order that the simulator needs.
    import torch  # noqa: F401  (loads torch_npu, its backend)
    import torch_npu  # noqa: F401  (by name too, where torch does not load it)

    runtime.after_torch_import()
    tensors.after_torch_import()
    from . import kernels  # noqa: F401  (registers the stand-ins)
    from .doors import aclnn, aclop, atb

    aclnn.install()
    aclop.install()
    atb.install()
    sys.path.append(str(Path(__file__).parent / "site"))  # pyACL, where set_env.sh would put it
    _installed = True
    atexit.register(_stop)
    if os.environ.get("ASCEND_SIM_DEVICES") != "0":
        _let_the_queue_give_up_the_lock()
        if os.environ.get("ASCEND_SIM_POISON", "1") != "0":
            runtime.poison_reused_memory()
    set_strict(os.environ.get("ASCEND_SIM_STRICT", "1") != "0")
    cann.plant_paired_wheel()
    faults.plant_for_the_process([name for name in planted if name != "no_atb"])
    reset_trace()


def _let_the_queue_give_up_the_lock() -> None:
    """With TASK_QUEUE_ENABLE=1 our kernels need Python's lock on the queue's thread.  torch_npu
    gives it up while it waits for that queue only once an aclop has run, because the real aclop
    compiler is Python too.  So run one."""
    import torch
    import torch_npu

    if os.environ["TASK_QUEUE_ENABLE"] == "0" or soc().startswith("Ascend950"):
        return  # the 950 has no aclop: simulate it without the queue
    torch_npu.npu.config.allow_internal_format = True
    tile = torch_npu.empty_with_format((16, 16), dtype=torch.float16, device="npu", acl_format=29)
    torch_npu.npu_format_cast(tile, 2)
    torch.npu.synchronize()
    torch_npu.npu.config.allow_internal_format = False


def _stop() -> None:
    """Python goes away before the runtime does: nothing may call back any more."""
    runtime.library.sim_set_callbacks(None, None)
    runtime.library.sim_set_plan_callback(None)
    runtime.library.sim_set_aclop_callback(None)


def trace_entries() -> list[TraceEntry]:
    return trace.read()


def reset_trace() -> None:
    trace.reset()


def set_strict(strict: bool) -> None:
    """Strict: an operator without a stand-in raises.  Otherwise aten operators run on the CPU and
    the trace calls them fallbacks."""
    from .doors import dispatcher

    dispatcher.close_door() if strict else dispatcher.open_door()


def operators() -> list[str]:
    """Every operator with a stand-in."""
    from .doors import aclnn, aclop, atb

    return [*aclnn.names(), *sorted(aclop.OPERATORS), *atb.names()]


def memory_statistics() -> MemoryStatistics:
    return MemoryStatistics(runtime.library.sim_device_bytes(), runtime.library.sim_device_peak())


def reset_peak() -> None:
    runtime.library.sim_reset_device_peak()


def abandon_pending() -> None:
    """Forgets queued work that can never finish, after a test of a hang."""
    runtime.library.sim_abandon_pending()
