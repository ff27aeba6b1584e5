"""Runs real vLLM's CPU backend and writes what came of it as JSON.

    export PYTHONPATH=PLUGIN:$PWD/tests
    $VLLM_CPU/bin/python -m handover.run_vllm_cpu MODEL FILE
        [--engine '{"tensor_parallel_size": 2}'] [--tokens 48] [--prompts prompts.json]

MODEL is a folder that vLLM serves, or an id of a hub (with HF_HUB_OFFLINE=0). FILE gets the engine,
prompts, tokens and log-probabilities.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from handover.asking import answer, sampling, tokens_of

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}
ENGINE: dict[str, Any] = {
    "max_model_len": 512,
    "max_num_seqs": 8,
    "dtype": "float32",
    "enforce_eager": True,
    "enable_prefix_caching": False,
}
SPECULATION = {"speculative_config", "spec_model"}
PROMPTS = ["What does river mean?"]


def main() -> None:
    options = parse()
    arguments = {**ENGINE, **options.engine}
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    ranks = arguments.get("tensor_parallel_size", 1) * arguments.get("pipeline_parallel_size", 1)
    if ranks > 1:
        cores = os.cpu_count() or 1
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(r % cores) for r in range(ranks))
    else:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    options.file.write_text(json.dumps(run(options, arguments), indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("file", type=Path)
    parser.add_argument("--engine", type=json.loads, default={}, help="arguments of LLM, as JSON")
    parser.add_argument("--tokens", type=int, default=48, help="greedy tokens for each prompt")
    parser.add_argument("--prompts", type=Path, help="a JSON list of texts or of lists of tokens")
    return parser.parse_args()


def run(options: argparse.Namespace, arguments: dict[str, Any]) -> dict[str, Any]:
    """Greedy answers with the log-probability of each token, those of the prompt too."""
    from vllm import LLM

    started = time.perf_counter()
    engine = LLM(options.model, **arguments)
    ready = time.perf_counter()
    prompts = json.loads(options.prompts.read_text()) if options.prompts else PROMPTS
    asked = [tokens_of(engine, prompt) for prompt in prompts]
    answers = engine.generate(asked, sampling(options.tokens, prompt_logprobs=True))
    return {
        "engine": arguments,
        "start_seconds": round(ready - started, 1),
        "generate_seconds": round(time.perf_counter() - ready, 1),
        "answers": [answer(each) for each in answers],
        "drafts": drafts(engine) if SPECULATION & arguments.keys() else None,
    }


def drafts(engine: Any) -> dict[str, Any]:
    """How many tokens a draft has proposed, and how many of them its target took."""
    counted = {metric.name: metric for metric in engine.get_metrics()}
    return {
        "proposed": counted["vllm:spec_decode_num_draft_tokens"].value,
        "accepted": counted["vllm:spec_decode_num_accepted_tokens"].value,
    }


if __name__ == "__main__":
    main()
