"""Operator launches of a decode step: real torch_npu on a simulated device.

A decode step at batch 1 is bound by launches and by reading weights, so the number of launches per
layer is a figure to push down. It is counted, not estimated: the trace of the simulated device
for a model of three layers, less that of a model of one, is the cost of two layers.

The floor for w8a8 is what torch_npu offers as fused operators (10, with
npu_qkv_rms_norm_rope_cache, which writes PA_NZ caches only: its bf16 keys can be read by no
attention operator on A2/A3, so without it the floor is 13).

Run in the simulator's environment (`make simulated` makes it):

    PYTHONPATH=tests TORCH_DEVICE_BACKEND_AUTOLOAD=0 .venv-sim/bin/python benchmarks/launches.py
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

import ascend_sim

ascend_sim.install()

import torch
import torch_npu

from qwen3_ascend.runtime import backends
from qwen3_ascend.runtime.engine.assembly import make_engine
from qwen3_ascend.runtime.engine.engine import Engine
from qwen3_ascend.runtime.engine.request import SamplingParams
from qwen3_ascend.runtime.options import DeviceOptions, EngineOptions
from qwen3_ascend.runtime.synthetic import SMALL_CONFIG, SyntheticWeights

FLOOR = {"w8a8": 10, "bf16": 9}
"""Launches with every fusion of torch_npu, npu_qkv_rms_norm_rope_cache included."""

STEPS = 4


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
    options = DeviceOptions("npu", attention=attention, graph=False, prefetch="off")
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


def report_replay(scheme: str, attention: str, batch: int) -> None:
    """Prints what one replayed step costs the host."""
    running = engine(scheme, 2, DeviceOptions("npu", attention=attention, buckets=(1, 2, 4)))
    decode(running, batch)
    trace = ascend_sim.trace
    copied = sum(entry.bytes for entry in trace.copies("host_to_device")) / STEPS
    updates, graphs = len(trace.host_updates()) / STEPS, len(trace.replays()) / STEPS
    print(
        f"{scheme}, {attention}, batch {batch}, replayed: {graphs:g} graph, {updates:g} updates "
        f"(2 layers), {copied:g} bytes to the device a step"
    )


def main() -> None:
    """Prints every figure."""
    torch.set_num_threads(1)
    for scheme in FLOOR:
        for attention in ("fused", "paged"):
            for batch in (1, 4):
                report_layer(scheme, batch, attention)
    for attention in ("fused", "paged"):
        report_replay("w8a8", attention, 4)


if __name__ == "__main__":
    main()
