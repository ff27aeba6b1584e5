"""Launches and host time of a decode step: real torch_npu on a simulated device.

Launches: a decode step at batch 1 is bound by launches and by reading weights, so their number per
layer is a figure to push down. It is counted, not estimated: the trace of the simulated device for
a model of three layers, less that of a model of one, is the cost of two layers. The floor for w8a8
is what torch_npu offers as fused operators (10, with npu_qkv_rms_norm_rope_cache, which writes
PA_NZ caches only: its bf16 keys can be read by no attention operator on A2/A3, so without it the
floor is 13).

Host time: what issuing one decode step takes the processor, for 28 layers with the heads of
Qwen3-0.6B, in plain steps and in each kind of graph. The stand-ins neither plan nor compute
meanwhile: in the place of their Python, an operator's first phase gets an answer from a ctypes
callback that returns one number, and a kernel on the device is nothing at all. So what is counted
is our Python, torch, torch_npu's Python and C++ with one such callback (its time is measured, too,
and printed) for each operator that is issued, and the simulated runtime's queues; not counted is
what CANN does for a launch or an update. ATB's operators are replaced at torch's dispatcher, so
their C++ is not counted either. Sampling is left out. It is the time that the issuing thread has a
processor (with torch_npu's task queue off, all of it is on this thread), of the fastest of several
rounds, since others may use the machine; with the ratio to plain steps of the same run.

Run in the simulator's environment (`make simulated` makes it):

    PYTHONPATH=tests TORCH_DEVICE_BACKEND_AUTOLOAD=0 .venv-sim/bin/python benchmarks/launches.py
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ascend_sim

os.environ.setdefault("ASCEND_SIM_POISON", "0")  # its time is no part of ours
ascend_sim.install()

import torch
import torch_npu
from ascend_sim import runtime
from ascend_sim.doors import aclnn

from qwen3_ascend.runtime import backends
from qwen3_ascend.runtime.backends.base import Forward
from qwen3_ascend.runtime.backends.npu import diagnose
from qwen3_ascend.runtime.backends.npu.backend import NpuBackend
from qwen3_ascend.runtime.backends.step import StepInputs
from qwen3_ascend.runtime.engine.assembly import assemble, make_engine
from qwen3_ascend.runtime.engine.engine import Engine
from qwen3_ascend.runtime.engine.request import SamplingParams
from qwen3_ascend.runtime.model.loader import load_model
from qwen3_ascend.runtime.model.qwen3 import Qwen3
from qwen3_ascend.runtime.options import DeviceOptions, EngineOptions
from qwen3_ascend.runtime.synthetic import SMALL_CONFIG, SyntheticWeights

FLOOR = {"w8a8": 10, "bf16": 9}
"""Launches with every fusion of torch_npu, npu_qkv_rms_norm_rope_cache included."""

STEPS = 4

LAYERS = 28
TIMED_CONFIG = dataclasses.replace(
    SMALL_CONFIG, num_layers=LAYERS, hidden_size=128, intermediate_size=256, vocab_size=512
)
"""Heads and layers of Qwen3-0.6B, and small matrices: the host issues them in the same time."""

WAYS = {
    "plain steps": DeviceOptions("npu", attention="fused", graph=False),
    "NPUGraph.update": DeviceOptions("npu", attention="fused", graph_lengths="update"),
    "bound calls": DeviceOptions("npu", attention="fused", graph_lengths="update"),
    "masked": DeviceOptions("npu", attention="fused", graph_lengths="masked"),
    "paged, plain steps": DeviceOptions("npu", attention="paged", graph=False),
    "paged, NPUGraph.update": DeviceOptions("npu", attention="paged", graph_lengths="update"),
    "paged, bound calls": DeviceOptions("npu", attention="paged", graph_lengths="update"),
}
BATCHES = (1, 16)
ROUNDS = 20
"""Of ten steps each; the fastest counts."""


def engine(scheme: str, layers: int, options: DeviceOptions) -> Engine:
    """A random model of a few layers in the shapes of Qwen3-0.6B."""
    config = dataclasses.replace(SMALL_CONFIG, num_layers=layers)
    backend = backends.get(config, options)
    limits = EngineOptions(kv_cache_tokens=1024, max_batch=4)
    return make_engine(SyntheticWeights(config, scheme), backend, limits, lambda *step: None)


def decode(running: Engine, batch: int) -> None:
    """Prefills, forgets the trace, and runs STEPS decode steps."""
    params = SamplingParams(max_new_tokens=STEPS + 1, ignore_eos=True)
    for number in range(batch):
        running.add([1 + number, 2, 3], params, frozenset())
    running.step()  # all prompts together
    torch_npu.npu.synchronize()
    ascend_sim.reset_trace()
    while running.busy:
        running.step()
    torch_npu.npu.synchronize()


def launches(scheme: str, layers: int, batch: int, attention: str) -> Counter[str]:
    """Launches of STEPS eager decode steps, by operator."""
    # Steps that run ahead would not be counted with those that they follow.
    options = DeviceOptions("npu", attention=attention, graph=False, run_ahead=False)
    decode(engine(scheme, layers, options), batch)
    return Counter(re.sub(r"^aclnn", "", entry.name) for entry in ascend_sim.trace.launches())


def report_layer(scheme: str, batch: int, attention: str) -> None:
    """Prints what one layer of one decode step launches."""
    extra = launches(scheme, 3, batch, attention)
    extra.subtract(launches(scheme, 1, batch, attention))
    per_layer = {name: count / (2 * STEPS) for name, count in extra.items() if count}
    total = sum(per_layer.values())
    ratio = total / FLOOR[scheme]
    print(
        f"{scheme}, {attention}, batch {batch}: {total:g} launches a layer, {ratio:.2f}x the floor"
    )
    print("   " + ", ".join(f"{name} {count:g}" for name, count in sorted(per_layer.items())))


# ------------------------------------------------------------------------------- host time
@contextlib.contextmanager
def hollow_kernels() -> Iterator[None]:
    """Stand-ins that neither plan nor compute; see the top of this file."""
    answer = aclnn.PlanCallback(lambda index, only_workspace, integers, floats: 1)
    plan = runtime.library.sim_set_plan_callback
    torch_npu.npu.synchronize()
    plan(answer)
    runtime.library.sim_set_callbacks(None, None)
    try:
        with hollow_atb():
            yield
            torch_npu.npu.synchronize()
    finally:
        plan(next(each for each in runtime._callbacks if isinstance(each, aclnn.PlanCallback)))
        runtime.library.sim_set_callbacks(*kernel_callbacks())


def kernel_callbacks() -> tuple[Any, Any]:
    """What runs and what drops a kernel, as the simulator has registered them."""
    kinds = (runtime.RunCallback, runtime.DropCallback)
    run, drop = (next(c for c in runtime._callbacks if isinstance(c, kind)) for kind in kinds)
    return run, drop


@contextlib.contextmanager
def hollow_atb() -> Iterator[None]:
    """ATB's operators as launches of nothing."""
    workspace = torch.empty(4096, dtype=torch.uint8, device="npu")

    def launch(*arguments: Any, **named: Any) -> None:
        stream = torch_npu.npu.current_stream().npu_stream
        runtime.library.sim_launch(stream, b"an operator of ATB", 1, 0)

    library = torch.library.Library("atb", "IMPL")
    calls: dict[str, Callable[..., Any]] = {
        "_npu_paged_attention": launch,
        "_npu_reshape_and_cache": launch,
        "_npu_paged_attention_get_workspace": lambda *arguments, **named: workspace,
    }
    for name, call in calls.items():
        library.impl(name, call, "PrivateUse1", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def callback_microseconds() -> float:
    """What one hollow answer costs, called from C."""
    answer = aclnn.PlanCallback(lambda index, only_workspace, integers, floats: 1)
    address = ctypes.cast(answer, ctypes.c_void_p).value
    assert address is not None
    called = aclnn.PlanCallback(address)
    started = time.thread_time()
    for _ in range(10_000):
        called(1, 0, None, None)
    return (time.thread_time() - started) * 100


def forward_of(model: Qwen3[Any], name: str, options: DeviceOptions) -> Forward:
    """The forward of one way; captured with real kernels."""
    assert isinstance(model.backend, NpuBackend)
    capabilities = model.backend.capabilities
    if "NPUGraph.update" in name:
        capabilities = diagnose.without_bound_updates(capabilities)
    backend = diagnose.open_backend(model.config, options, capabilities)
    limits = EngineOptions(kv_cache_tokens=64 * 128, max_batch=max(BATCHES))
    found: list[Forward] = []

    def keep(forward: Forward) -> Forward:
        found.append(forward)
        return forward

    assemble(dataclasses.replace(model, backend=backend), limits, watch=keep)
    return found[0]


def decode_step(batch: int, length: int) -> StepInputs:
    """A step of requests that have a block each."""
    rows = torch.arange(batch, dtype=torch.int32)
    return StepInputs(
        tokens=rows,
        positions=torch.full((batch,), length - 1, dtype=torch.int32),
        slots=(rows + 1) * 128 + length - 1,
        block_table=(rows + 1).view(-1, 1),
        context_lens=(length,) * batch,
        query_starts=tuple(range(batch + 1)),
        logit_rows=None,
    )


def host_microseconds(forward: Forward, batch: int) -> tuple[float, int]:
    """(host time of a step, launches the device is told of in it)."""
    steps = [decode_step(batch, length) for length in range(20, 30)]
    rounds = []
    for _ in range(ROUNDS):
        started = time.thread_time()
        for step in steps:
            forward(step)
        rounds.append((time.thread_time() - started) / len(steps) * 1e6)
        torch_npu.npu.synchronize()
    ascend_sim.reset_trace()
    forward(steps[0])
    torch_npu.npu.synchronize()
    trace = ascend_sim.trace
    on_its_own = [entry for entry in trace.launches() if not entry.is_update]
    issued = len(on_its_own) + len(trace.replays()) + len(trace.host_updates())
    return min(rounds), issued


def report_host() -> None:
    """Prints the host time of a decode step in every way."""
    backend = diagnose.open_backend(TIMED_CONFIG, WAYS["plain steps"])
    model = load_model(SyntheticWeights(TIMED_CONFIG, "w8a8"), backend)
    print(
        f"host time of a decode step, {LAYERS} layers, w8a8, on {processor()}, torch_npu "
        f"{torch_npu.__version__}; fastest of {ROUNDS} rounds; {callback_microseconds():.2f} us "
        f"for each operator are the callback's"
    )
    plain: dict[int, float] = {}
    for name, options in WAYS.items():
        gc.collect()
        forward = forward_of(model, name, options)
        with torch.inference_mode():
            for batch in BATCHES:
                forward(decode_step(batch, 20))
        with hollow_kernels(), torch.inference_mode():
            for batch in BATCHES:
                taken, issued = host_microseconds(forward, batch)
                base = plain.setdefault(batch, taken)
                print(
                    f"   {name}, batch {batch}: {taken:.0f} us, {taken / base:.2f} of plain steps; "
                    f"{issued} launches and updates issued"
                )


def processor() -> str:
    """The name of the processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "an unknown processor"


def main() -> None:
    """Prints every figure."""
    parser = argparse.ArgumentParser(description="Launches and host time of a decode step.")
    parser.add_argument("--only", choices=("launches", "host"))
    only = parser.parse_args().only
    torch.set_num_threads(1)
    if only != "host":
        for scheme in FLOOR:
            for attention in ("fused", "paged"):
                for batch in (1, 4):
                    report_layer(scheme, batch, attention)
    if only != "launches":
        report_host()


if __name__ == "__main__":
    main()
