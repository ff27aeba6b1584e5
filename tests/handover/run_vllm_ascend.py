"""Runs real vllm-ascend on the simulated device and writes what came of it as JSON.

    .venv-vllm-ascend/bin/python tests/handover/run_vllm_ascend.py MODEL FOLDER
        [--graphs] [--engine '{"max_model_len": 512}'] [--tokens 24] [--prompts prompts.json]

MODEL is a folder that vLLM serves. FOLDER gets `answers.json` (the engine, prompts, tokens, log-
probabilities, and what each rank's device did) and, for each rank, `loading-RANK.json` (see
device_work.py). With '{"tensor_parallel_size": 2}' two workers have a simulated device each.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent
ENVIRONMENT = {
    "ASCEND_SIM_EVERYWHERE": "1",
    "ASCEND_SIM_THEN": "handover.torchvision_schemas",
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",  # torch would load torch_npu before the stand-ins
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # workers are sent functions that read their trace
}
# vLLM 0.23.0 is older than torch 2.13, whose caches of compiled graphs it cannot write.
WITHOUT_CACHES = {
    "TORCHINDUCTOR_AUTOGRAD_CACHE": "0",
    "VLLM_DISABLE_COMPILE_CACHE": "1",
    "VLLM_USE_AOT_COMPILE": "0",
}
ENGINE: dict[str, Any] = {
    "max_model_len": 512,
    "max_num_seqs": 8,
    "dtype": "bfloat16",
    "enforce_eager": True,
    "enable_prefix_caching": False,
    # By itself it takes what is free, and the simulator fills what is taken.
    "kv_cache_memory_bytes": 64 << 20,
    "disable_log_stats": True,
}
# Only decoding is captured, as vllm-ascend does it by default for dense models. The two passes need
# Triton and a CANN's graph engine.
GRAPHS: dict[str, Any] = {
    "enforce_eager": False,
    "compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [4, 8]},
    "additional_config": {
        "ascend_compilation_config": {"fuse_qknorm_rope": False, "enable_npugraph_ex": False}
    },
}
PROMPTS = ["What does river mean?", "Tell me of the sea.", "Who lives in the old house?", "Why?"]


def main() -> None:
    options = parse()
    if "ASCEND_SIM_EVERYWHERE" not in os.environ:  # the simulator starts with Python: start again
        os.environ.update(environment(options))
        os.execv(sys.executable, [sys.executable, *sys.argv])
    options.folder.mkdir(parents=True, exist_ok=True)
    report = run(options)
    (options.folder / "answers.json").write_text(json.dumps(report, indent=1))


def environment(options: argparse.Namespace) -> dict[str, str]:
    """What the engine and all its processes are started with."""
    sites = [
        TESTS / "handover/site",
        TESTS / "ascend_sim/site",
        TESTS,
        os.environ.get("PYTHONPATH"),
    ]
    sizes = ("tensor_parallel_size", "pipeline_parallel_size")
    ranks = math.prod(options.engine.get(size, 1) for size in sizes)
    return {
        **ENVIRONMENT,
        **(WITHOUT_CACHES if options.graphs else {}),
        **({"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if ranks == 1 else {}),
        "PYTHONPATH": os.pathsep.join(str(site) for site in sites if site),
        "ASCEND_SIM_DEVICES": str(ranks),
        "HANDOVER_LOADING": str(options.folder.resolve()),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--graphs", action="store_true", help="capture decoding in ACL graphs")
    parser.add_argument("--engine", type=json.loads, default={}, help="arguments of LLM, as JSON")
    parser.add_argument("--tokens", type=int, default=24, help="greedy tokens for each prompt")
    parser.add_argument("--prompts", type=Path, help="a JSON list of texts or of lists of tokens")
    parser.add_argument("--prompt-logprobs", action="store_true", help="of each prompt's tokens")
    return parser.parse_args()


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Greedy answers with the log-probability of each token."""
    import torch
    from vllm import LLM

    from handover.asking import answer, sampling, tokens_of
    from handover.device_work import forget, report

    arguments = {**ENGINE, **(GRAPHS if options.graphs else {}), **options.engine}
    started = time.perf_counter()
    engine = LLM(str(options.model), **arguments)
    ready = time.perf_counter()
    engine.collective_rpc(forget)
    prompts = json.loads(options.prompts.read_text()) if options.prompts else PROMPTS
    asked = [tokens_of(engine, prompt) for prompt in prompts]
    answers = engine.generate(asked, sampling(options.tokens, options.prompt_logprobs))
    return {
        "engine": {key: str(value) for key, value in arguments.items()},
        "start_seconds": round(ready - started, 1),
        "generate_seconds": round(time.perf_counter() - ready, 1),
        "generation": engine.collective_rpc(report),
        "answers": [answer(each) for each in answers],
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
