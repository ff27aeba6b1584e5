"""A caller may already be in inference mode: what is made there is written by our threads too."""

from __future__ import annotations

from pathlib import Path

import torch

from qwen3_ascend import SamplingParams, load


def test_loading_inside_inference_mode(checkpoints: dict[str, Path]) -> None:
    params = SamplingParams(max_new_tokens=3, ignore_eos=True)
    with torch.inference_mode():
        llm = load(checkpoints["w8a8"], device="npu", kv_cache_tokens=1024, max_batch=1)
        answer = llm.generate(["Hello"], params)[0]
    assert len(answer.token_ids) == 3
