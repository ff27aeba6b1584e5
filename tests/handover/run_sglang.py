"""Runs real SGLang on the simulated device and writes what came of it as JSON.

    SGLANG/bin/python tests/handover/run_sglang.py MODEL FOLDER --prompts prompts.json
        [--tokens 24] [--engine '{"context_length": 512}']

MODEL is a folder that SGLang serves. FOLDER, which is there, gets `answers.json` (prompts, tokens,
log-probabilities), `loading-0.json` (see device_work.py) and `weights-0.pt`, every parameter as the
device holds it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent
ENVIRONMENT = {
    "ASCEND_SIM_EVERYWHERE": "1",
    "ASCEND_SIM_THEN": "handover.sglang_patches",
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",  # torch would load torch_npu before the stand-ins
    # SGLang's own Triton kernels, interpreted: Triton for Ascend compiles with a CANN.
    "TRITON_INTERPRET": "1",
    # Attention by npu_fused_infer_attention_score. By default SGLang prefills with an operator of
    # ATB that the simulator does not have.
    "ASCEND_USE_FIA": "1",
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}
ENGINE: dict[str, Any] = {
    "device": "npu",
    "dtype": "bfloat16",
    "context_length": 512,
    "max_running_requests": 8,
    # By itself it takes a share of what is free, and the simulator fills what is taken.
    "max_total_tokens": 4096,
    "disable_cuda_graph": True,
    "disable_radix_cache": True,
    "skip_tokenizer_init": True,
    "log_level": "info",  # by itself it keeps even warnings to itself
}


def main() -> None:
    options = parse()
    if "ASCEND_SIM_EVERYWHERE" not in os.environ:  # the simulator starts with Python: start again
        os.environ.update(environment(options))
        os.execv(sys.executable, [sys.executable, *sys.argv])
    report = run(options)
    (options.folder / "answers.json").write_text(json.dumps(report, indent=1))


def environment(options: argparse.Namespace) -> dict[str, str]:
    """What the engine and all its processes are started with."""
    sites = (TESTS / "handover/site", TESTS / "ascend_sim/site", TESTS)
    return {
        **ENVIRONMENT,
        "PYTHONPATH": os.pathsep.join(map(str, sites)),
        "HANDOVER_LOADING": str(options.folder.resolve()),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=Path, required=True, help="a JSON list of token lists")
    parser.add_argument("--tokens", type=int, default=24, help="greedy tokens for each prompt")
    parser.add_argument("--engine", type=json.loads, default={}, help="arguments of Engine, JSON")
    return parser.parse_args()


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Greedy answers with the log-probability of each token, those of the prompts too."""
    import sglang

    started = time.perf_counter()
    engine = sglang.Engine(model_path=str(options.model), **{**ENGINE, **options.engine})
    ready = time.perf_counter()
    prompts = json.loads(options.prompts.read_text())
    outputs = engine.generate(
        input_ids=prompts,
        sampling_params={"temperature": 0, "max_new_tokens": options.tokens},
        return_logprob=True,
        logprob_start_len=0,
    )
    report = {
        "start_seconds": round(ready - started, 1),
        "generate_seconds": round(time.perf_counter() - ready, 1),
        "answers": [answer(*each) for each in zip(prompts, outputs, strict=True)],
    }
    engine.shutdown()
    return report


def answer(prompt: list[int], output: dict[str, Any]) -> dict[str, Any]:
    """Tokens and log-probabilities, those of the prompt from its second token on."""
    said = output["meta_info"]
    return {
        "prompt": prompt,
        "prompt_logprobs": [value for value, *_ in said["input_token_logprobs"][1:]],
        "tokens": output["output_ids"],
        "logprobs": [value for value, *_ in said["output_token_logprobs"]],
    }


if __name__ == "__main__":
    main()
