"""Generating on a CPU against transformers, on the same random weights, in one run.

    python benchmarks/generate.py                      Qwen3-0.6B shapes, batch 1
    python benchmarks/generate.py --layers 8 --new 32

Random weights: speed only, says nothing about quality. Each engine prefills the same prompt, then
decodes; the best of --repeat runs counts, because other work on the machine only ever adds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import random_model
import torch

from qwen3_ascend import ConvertOptions, SamplingParams, convert_checkpoint
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.runtime import backends
from qwen3_ascend.runtime.engine.assembly import make_engine
from qwen3_ascend.runtime.options import DeviceOptions, EngineOptions

Run = Callable[[list[int], int], tuple[float, float]]
"""(prompt, new tokens) -> seconds of prefill and of decode."""


@dataclass(frozen=True)
class Speed:
    """Tokens a second."""

    prefill: float
    decode: float


def ours(checkpoint: Path) -> Run:
    """A converted checkpoint on the CPU backend in bfloat16."""
    reader = CheckpointReader(checkpoint)
    backend = backends.get(reader.config, DeviceOptions("cpu"))
    limits = EngineOptions(kv_cache_tokens=4096, max_batch=1)
    engine = make_engine(reader, backend, limits, lambda *step: None)

    def run(prompt: list[int], new: int) -> tuple[float, float]:
        params = SamplingParams(max_new_tokens=new + 1, ignore_eos=True)
        engine.add(prompt, params, frozenset())
        started = time.perf_counter()
        engine.step()
        prefilled = time.perf_counter()
        while engine.busy:
            engine.step()
        return prefilled - started, time.perf_counter() - prefilled

    return run


def transformers_eager(source: Path) -> Run:
    """The same source in transformers, bfloat16, greedy, with its own cache."""
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)

    @torch.inference_mode()
    def run(prompt: list[int], new: int) -> tuple[float, float]:
        cache, tokens = DynamicCache(), torch.tensor([prompt])
        started = time.perf_counter()
        logits = model(tokens, past_key_values=cache, logits_to_keep=1).logits
        prefilled = time.perf_counter()
        for _ in range(new):
            tokens = logits[:, -1:].argmax(-1)
            logits = model(tokens, past_key_values=cache, logits_to_keep=1).logits
        return prefilled - started, time.perf_counter() - prefilled

    return run


def measure(run: Run, prompt: list[int], new: int, repeat: int) -> Speed:
    """The best of a few runs after one that does not count."""
    run(prompt, 2)
    times = [run(prompt, new) for _ in range(repeat)]
    prefill, decode = (min(column) for column in zip(*times, strict=True))
    return Speed(len(prompt) / prefill, new / decode)


def main() -> None:
    """Measures the three engines and prints ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="0.6b", choices=random_model.SHAPES)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=48, help="tokens to decode")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--workdir", type=Path, default=Path(tempfile.gettempdir()) / "qwen3-ascend"
    )
    chosen = parser.parse_args()
    data = random_model.config(chosen.model, chosen.layers)
    name = f"{chosen.model}-{data['num_hidden_layers']}"
    source = random_model.ensure(chosen.workdir / name, data)
    prompt = torch.randint(0, 100_000, (chosen.prompt,)).tolist()
    speeds: dict[str, Speed] = {}
    for recipe in ("w8a8", "bf16"):
        output = chosen.workdir / f"{name}-{recipe}"
        convert_checkpoint(source, output, recipe, ConvertOptions(overwrite=True))
        speeds[f"ours {recipe}"] = measure(ours(output), prompt, chosen.new, chosen.repeat)
    peer = measure(transformers_eager(source), prompt, chosen.new, chosen.repeat)
    print(f"{name}, {torch.get_num_threads()} threads, prompt {chosen.prompt}, {chosen.new} new")
    print(f"transformers bf16: prefill {peer.prefill:.0f}, decode {peer.decode:.1f} tokens/s")
    for engine, speed in speeds.items():
        ratios = f"{speed.prefill / peer.prefill:.2f}x and {speed.decode / peer.decode:.2f}x"
        print(
            f"{engine}: prefill {speed.prefill:.0f}, decode {speed.decode:.1f} tokens/s: {ratios}"
        )


if __name__ == "__main__":
    main()
