"""Which CANN the device pretends to have, and what differs between its releases.

The environment variable ASCEND_SIM_CANN (8.3, 8.5, 9.0, 9.1) chooses it for the whole process, and
`pretending` for a part of one.  A release stands for a pair, as Ascend publishes pairs: its
operators, and what the torch_npu wheels built for it lack.  The latter is planted on whatever wheel
is installed, so that one environment can play all four.

Sources: COMPATIBILITY.en.md of Ascend/pytorch for the pairs; the tiling and the aclnn pages of
ops-transformer and ops-nn, and op-plugin's branches 7.1.0 to 26.1.0, for the operators; the Python
files of the wheels themselves for the graph handlers.  Where they leave a release open ("TND may
work with CANN 9.0"), the simulator refuses.
"""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

Handlers = Literal["method", "table", "hard_coded", "hard_coded_without_paged"]
"""How a wheel tells which arguments NPUGraph.update can replace; see graph_handlers.py."""

ENVIRONMENT = "ASCEND_SIM_CANN"
NEWEST = "9.1"


@dataclass(frozen=True)
class Generation:
    """One CANN release.

    Attributes:
        name: as ASCEND_SIM_CANN gives it.
        version: what the wheel is told.
        wheels: torch_npu versions that Ascend pairs with it.
        rotary_tnd: npu_apply_rotary_pos_emb takes the layout TND; without, BSND alone.
        rotary_head_sizes: the head sizes it takes.
        cache_mode: npu_scatter_pa_kv_cache has this argument; without, it always writes PA_NZ.
        whole_masked_output: the wheel allocates the masked y2 of npu_add_rms_norm_dynamic_quant
            with the shape of x, which the operator then refuses (EZ1001).
        single_norm_scales: npu_add_rms_norm_quant takes float32 scales beside bfloat16 inputs;
            the documents of op-plugin 7 know bfloat16 ones only.
        handlers: of NPUGraph.update.
        decode_splits_keys: attention in the layout TND spreads one long context over many cores;
            without, a decode step goes to the prefill kernel, which does not.
        grouped_swiglu_v2: the wheel has npu_grouped_matmul_swiglu_quant_v2, which takes counts;
            without, the first version alone, which takes their sums.
    """

    name: str
    version: str
    wheels: tuple[str, ...]
    rotary_tnd: bool = True
    rotary_head_sizes: tuple[int, ...] = (64, 128)
    cache_mode: bool = True
    whole_masked_output: bool = False
    single_norm_scales: bool = True
    handlers: Handlers = "method"
    decode_splits_keys: bool = True
    grouped_swiglu_v2: bool = True


_CANN_8 = Generation(
    "8",
    "",
    (),
    rotary_tnd=False,
    rotary_head_sizes=(128,),
    cache_mode=False,
    single_norm_scales=False,
    decode_splits_keys=False,
)
GENERATIONS = {
    generation.name: generation
    for generation in (
        replace(
            _CANN_8,
            name="8.3",
            version="8.3.RC1",
            wheels=("2.6.0.post3", "2.7.1", "2.8.0"),
            whole_masked_output=True,
            handlers="hard_coded_without_paged",
            grouped_swiglu_v2=False,
        ),
        replace(
            _CANN_8,
            name="8.5",
            version="8.5.0",
            wheels=("2.6.0.post5", "2.7.1.post2", "2.8.0.post2", "2.9.0"),
            handlers="hard_coded",
        ),
        Generation(
            "9.0",
            "9.0.0",
            ("2.7.1.post4", "2.8.0.post4", "2.9.0.post2", "2.10.0", "2.10.0.post2"),
            rotary_tnd=False,
            single_norm_scales=False,
            handlers="table",
        ),
        Generation(
            "9.1",
            "9.1.0",
            ("2.7.1.post8", "2.9.0.post6", "2.10.0.post4", "2.11.0", "2.12.0"),
        ),
    )
}


def named(name: str) -> Generation:
    """ValueError for a release that is not simulated."""
    if name not in GENERATIONS:
        raise ValueError(f"{ENVIRONMENT}={name} is none of {', '.join(GENERATIONS)}")
    return GENERATIONS[name]


_stack = [named(os.environ.get(ENVIRONMENT) or NEWEST)]


def current() -> Generation:
    """The release of this moment."""
    return _stack[-1]


@contextlib.contextmanager
def altered(**changes: object) -> Iterator[None]:
    """The current release with some of its fields changed: a mixture that nobody published."""
    # The fields are of several types, which keywords collected in one dictionary cannot say.
    _stack.append(replace(current(), **changes))  # type: ignore[arg-type]
    try:
        yield
    finally:
        _stack.pop()


@contextlib.contextmanager
def pretending(name: str) -> Iterator[None]:
    """Another release inside a process: its rules, the version it states, its wheels' absences."""
    before = os.environ.get(ENVIRONMENT)
    generation = named(name)
    _stack.append(generation)
    os.environ[ENVIRONMENT] = name  # the C side reads it whenever somebody asks for the version
    try:
        with paired_wheel(generation):
            yield
    finally:
        _stack.pop()
        if before is None:
            del os.environ[ENVIRONMENT]
        else:
            os.environ[ENVIRONMENT] = before


@contextlib.contextmanager
def paired_wheel(generation: Generation) -> Iterator[None]:
    """Takes from the installed wheel what the wheels of a release lack."""
    from .absences import without_argument, without_operator
    from .graph_handlers import graph_handlers

    with contextlib.ExitStack() as absent:
        if not generation.cache_mode:
            absent.enter_context(without_argument("npu_scatter_pa_kv_cache", "cache_mode"))
        if not generation.grouped_swiglu_v2:
            absent.enter_context(without_operator("npu_grouped_matmul_swiglu_quant_v2"))
        absent.enter_context(graph_handlers(generation.handlers))
        yield


def plant_paired_wheel() -> None:
    """For the whole process, after torch_npu was imported."""
    _for_the_process.enter_context(paired_wheel(current()))
    atexit.register(_for_the_process.close)  # before the modules that it repairs go away


_for_the_process = contextlib.ExitStack()
