"""Time of choosing a token on a CPU, with the sampler of an earlier version in turn.

    python benchmarks/sampling.py                             this version
    python benchmarks/sampling.py --earlier other/src         and another one, interleaved

Rows of Qwen3's vocabulary that fall off as a language model's do, rounded to bfloat16. The versions
choose for the same rows, and are the first in turn; the best of --repeat rounds counts, the median
is in brackets. On an NPU the rows stay on the device; docs/ascend.md says what is copied.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import random_model
import torch
from torch import Tensor

from qwen3_ascend import SamplingParams
from qwen3_ascend.runtime.engine import sampler
from qwen3_ascend.runtime.engine.request import Request

VOCABULARY = 151936

SETTINGS = {
    "Qwen3: 0.6 / 20 / 0.95": SamplingParams(temperature=0.6, top_k=20, top_p=0.95, seed=1),
    "top_p 0.95": SamplingParams(temperature=0.6, top_p=0.95, seed=1),
    "temperature 1": SamplingParams(temperature=1.0, seed=1),
    "greedy, penalty 1.1, 4000 tokens": SamplingParams(repetition_penalty=1.1),
    "greedy": SamplingParams(),
}


def earlier_sampler(source: Path) -> Any:
    """The module of another version, beside this one's."""
    path = source / "qwen3_ascend" / "runtime" / "engine" / "sampler.py"
    spec = importlib.util.spec_from_file_location("earlier_sampler", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def logits(rows: int, seed: int) -> Tensor:
    """Float32 [rows, vocab]; the token of rank r has 20 - 1.5 log(r), and some noise."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(VOCABULARY, generator=generator) for _ in range(rows)])
    noise = torch.randn(rows, VOCABULARY, generator=generator) / 2
    return (20 - 1.5 * (order + 1).log() + noise).bfloat16().float()


def requests(params: SamplingParams, rows: int) -> list[Request]:
    """As many, each with a context of 4000 different tokens."""
    return [
        Request(number, params, list(range(4000)), 2000, 10000, frozenset())
        for number in range(rows)
    ]


def measure(modules: dict[str, Any], params: SamplingParams, batch: int, repeat: int) -> None:
    """Prints microseconds a row for each version."""
    samplers = {name: module.Sampler() for name, module in modules.items()}
    seconds: dict[str, list[float]] = {name: [] for name in modules}
    asked = requests(params, batch)
    for round_number in range(repeat + 1):
        rows = logits(batch, round_number)
        # Who comes second finds the rows in the cache, so they take turns at that, too.
        for name, choose in sorted(samplers.items(), reverse=bool(round_number % 2)):
            begin = time.perf_counter()
            choose(rows, asked)
            seconds[name].append(time.perf_counter() - begin)
    best = {name: 1e6 * min(times[1:]) / batch for name, times in seconds.items()}
    middle = {name: 1e6 * statistics.median(times[1:]) / batch for name, times in seconds.items()}
    shown = [f"{name} {best[name]:.0f} us ({middle[name]:.0f})" for name in modules]
    if "before" in best:
        shown.append(f"{best['before'] / best['now']:.1f}x")
    print(f"  batch {batch}: {', '.join(shown)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--earlier", type=Path, help="src folder of another version")
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    arguments = parser.parse_args()
    modules: dict[str, Any] = {"now": sampler}
    if arguments.earlier:
        modules["before"] = earlier_sampler(arguments.earlier)
    print(f"{random_model.processor()}, {torch.get_num_threads()} threads; time of a row")
    for name, params in SETTINGS.items():
        print(name)
        for batch in arguments.batch:
            measure(modules, params, batch, arguments.repeat)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
