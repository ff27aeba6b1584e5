"""Perplexity of a converted checkpoint against another, teacher forced, on the same text.

python benchmarks/perplexity.py out/bf16 out/w8a8 --text tests/data/tiny-qwen3/heldout.txt
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from qwen3_ascend import load
from qwen3_ascend.runtime import LLM


def perplexity(llm: LLM, windows: list[list[int]]) -> float:
    """exp of the mean negative log-likelihood over all windows, each token after the first."""
    total, count = 0.0, 0
    for window in windows:
        logits = llm.logits(window[:-1])
        picked = logits.log_softmax(-1).gather(1, torch.tensor(window[1:])[:, None])
        total, count = total - float(picked.double().sum()), count + len(picked)
    return math.exp(total / count)


def main() -> None:
    """Prints both figures and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reference", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--window", type=int, default=768)
    parser.add_argument("--windows", type=int, default=16)
    chosen = parser.parse_args()
    reference = load(chosen.reference, kv_cache_tokens=2 * chosen.window, max_batch=1)
    tokens = reference.tokenizer.encode(chosen.text.read_text(encoding="utf-8"))
    starts = range(0, len(tokens) - chosen.window, chosen.window)
    windows = [tokens[at : at + chosen.window] for at in starts][: chosen.windows]
    base = perplexity(reference, windows)
    llm = load(chosen.checkpoint, kv_cache_tokens=2 * chosen.window, max_batch=1)
    other = perplexity(llm, windows)
    print(f"{sum(map(len, windows))} tokens in windows of {chosen.window}")
    print(f"{chosen.reference}: {base:.4f}")
    print(f"{chosen.checkpoint}: {other:.4f}, {100 * (other / base - 1):+.2f} %")


if __name__ == "__main__":
    main()
