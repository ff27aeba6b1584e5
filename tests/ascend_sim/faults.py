"""Planted faults: devices and wheels that a loader, a backend or a doctor must cope with.

Each is a context manager.  Those without arguments can also be planted for a whole process, by
name in ASCEND_SIM_FAULTS (see `PLANTS`), for a command line under test.  Switches that change the
machine itself are read once, from the environment (see README): no device, another SoC, less
memory.
"""

from __future__ import annotations

import atexit
import contextlib
from collections.abc import Callable, Iterator
from functools import partial

from . import cann, nz, runtime
from .absences import without_argument, without_attribute, without_operator
from .graph_handlers import graph_handlers
from .limits import Refused

__all__ = [
    "corrupt_wide_swiglu",
    "failing_copies",
    "failing_update",
    "graph_handlers",
    "nd_instead_of_nz",
    "refusing",
    "rotary_without_tnd",
    "stream_limit",
    "transposed_nz_tiles",
    "whole_masked_output",
    "without_argument",
    "without_atb",
    "without_attribute",
    "without_cache_mode",
    "without_operator",
]

_planted: list[str] = []
_refusals: list[Callable[..., None]] = []


@contextlib.contextmanager
def _plant(name: str) -> Iterator[None]:
    _planted.append(name)
    try:
        yield
    finally:
        _planted.remove(name)


def planted(name: str) -> bool:
    """Whether a fault that a stand-in has to ask for is there."""
    return name in _planted


def require_atb() -> None:
    """Raises what the wheel raises.  It means to add a hint to source set_env.sh, but with this
    version of torch the text it looks for is not in the exception, and its message stays empty:
    test_faults.py compares the two."""
    if planted("without_atb"):
        raise OSError(None, "")


def refuse(operator: str, arguments: list[object]) -> None:
    """What the doors ask before they plan a call."""
    for refusal in _refusals:
        refusal(operator, arguments)


# ---------------------------------------------------------------- what the wheel or CANN lacks
def without_atb() -> contextlib.AbstractContextManager[None]:
    """Every ATB operator raises what the wheel raises on a machine without NNAL."""
    return _plant("without_atb")


def without_cache_mode() -> contextlib.AbstractContextManager[None]:
    """npu_scatter_pa_kv_cache as in the wheels for CANN 8: no cache_mode, always PA_NZ."""
    return without_argument("npu_scatter_pa_kv_cache", "cache_mode")


def rotary_without_tnd() -> contextlib.AbstractContextManager[None]:
    """npu_apply_rotary_pos_emb as in CANN 8: four dims, BSND, head size 128."""
    return cann.altered(rotary_tnd=False, rotary_head_sizes=(128,))


def whole_masked_output() -> contextlib.AbstractContextManager[None]:
    """npu_add_rms_norm_dynamic_quant refuses a masked output, as with the wheels for CANN 8.3."""
    return cann.altered(whole_masked_output=True)


@contextlib.contextmanager
def refusing(
    operator: str, rule: str, when: Callable[..., bool] = lambda *arguments: True
) -> Iterator[None]:
    """An operator (named as in `ascend_sim.operators()`) refuses the calls for which
    `when(*arguments)` holds, in the first phase, where a card refuses.  Tensors among the
    arguments are DeviceTensors."""

    def check(name: str, arguments: list[object]) -> None:
        if name == operator and when(*arguments):
            raise Refused(f"{operator}: {rule}")

    _refusals.append(check)
    try:
        yield
    finally:
        _refusals.remove(check)


# ---------------------------------------------------------------------- wrong results and bytes
def corrupt_wide_swiglu() -> contextlib.AbstractContextManager[None]:
    """npu_dequant_swiglu_quant gives wrong scales for rows that take more than one tile: the risk
    of its path for wide rows, whose row maximum is read with no event in between."""
    return _plant("corrupt_wide_swiglu")


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


# ------------------------------------------------------------------------ a runtime that fails
@contextlib.contextmanager
def failing_copies(count: int = 1) -> Iterator[None]:
    """The next `count` memory copies return an error code."""
    runtime.library.sim_fail_copies(count)
    try:
        yield
    finally:
        runtime.library.sim_fail_copies(0)


@contextlib.contextmanager
def failing_update(after: int = 0) -> Iterator[None]:
    """Graph updates fail once `after` task groups were updated: of the layers of one step, the
    first few have their new lengths, and the captured waits of the others never end."""
    runtime.library.sim_fail_updates(after)
    try:
        yield
    finally:
        runtime.library.sim_fail_updates(-1)


@contextlib.contextmanager
def stream_limit(count: int) -> Iterator[None]:
    """The device has `count` streams; captured graphs and their task groups take some of them."""
    before = runtime.library.sim_set_stream_limit(count)
    try:
        yield
    finally:
        runtime.library.sim_set_stream_limit(before)


# ---------------------------------------------------------------------------- a whole process
PLANTS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    plant.__name__: plant
    for plant in (
        corrupt_wide_swiglu,
        nd_instead_of_nz,
        rotary_without_tnd,
        transposed_nz_tiles,
        whole_masked_output,
        without_atb,
        without_cache_mode,
    )
} | {
    "graph_handlers_table": partial(graph_handlers, "table"),
    "graph_handlers_hard_coded": partial(graph_handlers, "hard_coded"),
    "graph_handlers_hard_coded_without_paged": partial(graph_handlers, "hard_coded_without_paged"),
}
"""Names for ASCEND_SIM_FAULTS, beside `no_atb`, which leaves libatb.so out."""


def plant_for_the_process(names: list[str]) -> None:
    """Plants faults that stay; ValueError for a name that is none."""
    for name in names:
        if name not in PLANTS:
            raise ValueError(f"ASCEND_SIM_FAULTS: {name} is none of no_atb, {', '.join(PLANTS)}")
        _for_the_process.enter_context(PLANTS[name]())
    atexit.register(_for_the_process.close)


_for_the_process = contextlib.ExitStack()
