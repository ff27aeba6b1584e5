"""Steps that are given to the device before the last one is read: real torch_npu on a simulated
device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ascend_sim
import pytest

from qwen3_ascend import SamplingParams, load
from qwen3_ascend.runtime import LLM, Completion

pytestmark = pytest.mark.every_mode

WORDS = ("river", "bicycle", "house", "oxygen", "create")
PROMPTS = [f"What does {word} mean?" for word in WORDS]
COUNTS = (3, 30, 11, 30, 17)


def open_npu(path: Path, *, run_ahead: bool, graph: bool = True) -> LLM:
    return load(
        path, device="npu", kv_cache_tokens=2048, max_batch=4, buckets=(1, 2, 4),
        graph=graph, run_ahead=run_ahead,
    )  # fmt: skip


def tokens_of(answers: list[Completion]) -> list[tuple[int, ...]]:
    return [answer.token_ids for answer in answers]


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("run_ahead", [True, False])
def test_greedy_and_drawn_answers_equal_the_cpu(
    checkpoints: dict[str, Path], run_ahead: bool, graph: bool
) -> None:
    """Five answers of different lengths in a batch of four, one of them drawn for a while."""
    params = [SamplingParams(max_new_tokens=count) for count in COUNTS]
    params[2] = SamplingParams(max_new_tokens=11, temperature=0.5, top_k=5, seed=4)
    cpu = load(checkpoints["w8a8"], device="cpu", kv_cache_tokens=2048, max_batch=4)
    npu = open_npu(checkpoints["w8a8"], run_ahead=run_ahead, graph=graph)
    assert tokens_of(npu.generate(PROMPTS, params)) == tokens_of(cpu.generate(PROMPTS, params))


def test_chunks_of_a_prompt_choose_nothing(checkpoints: dict[str, Path]) -> None:
    """Beside an answer that goes on: steps with and without a token, and no empty tensor."""
    prompts, params = ["river " * 60, PROMPTS[1]], SamplingParams(max_new_tokens=12)
    sizes: dict[str, Any] = {"kv_cache_tokens": 2048, "max_batch": 2, "step_tokens": 16}
    npu, cpu = (load(checkpoints["w8a8"], device=device, **sizes) for device in ("npu", "cpu"))
    for asked in (prompts, prompts[:1]):
        expected = tokens_of(cpu.generate(asked, params))
        assert tokens_of(npu.generate(asked, params)) == expected


def test_a_stream_that_is_closed_leaves_the_next_answer_right(
    checkpoints: dict[str, Path],
) -> None:
    """A step of the closed one is still in flight, and writes to blocks that are free again."""
    npu = open_npu(checkpoints["w8a8"], run_ahead=True)
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    (expected,) = tokens_of(npu.generate(PROMPTS[:1], params))
    for _ in range(3):
        stream = npu.stream(PROMPTS[1], params)
        next(stream)
        stream.close()
        assert tokens_of(npu.generate(PROMPTS[:1], params)) == [expected]


def test_the_host_waits_for_tokens_and_for_nothing_else(checkpoints: dict[str, Path]) -> None:
    """Eleven tokens, eight bytes each, are all that comes back."""
    npu = open_npu(checkpoints["w8a8"], run_ahead=True)
    ascend_sim.reset_trace()
    npu.generate(PROMPTS[:1], SamplingParams(max_new_tokens=11, ignore_eos=True))
    copies = ascend_sim.trace.copies("device_to_host")
    assert [copy.bytes for copy in copies] == [8] * 11
    assert len(ascend_sim.trace.replays()) == 10
