"""The NPU backend says what the CPU backend says: real torch_npu on a simulated device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qwen3_ascend import SamplingParams, load
from qwen3_ascend.runtime import LLM

pytestmark = pytest.mark.opposite_modes

# Where a float32 sum is rounded to bf16 at another place, a logit of about 20 may move by a few
# units in the last of bf16's 8 bits (2^-4 at that size).
LOGIT_BOUND = 0.5

LOGIT_UNIT = 2.0**-4 + 1e-6
"""Of bf16 at the size of the largest logits, and what a float32 logarithm adds to it."""

WORDS = ("river", "bicycle", "house", "oxygen", "create", "water", "mountain", "teacher", "music")
PROMPTS = [f"What does {word} mean?" for word in WORDS]
BUCKETS = (1, 2, 4, 8)


def open_npu(path: Path, **options: Any) -> LLM:
    return load(
        path, device="npu", block_size=128, kv_cache_tokens=8192, max_batch=9,
        **{"buckets": BUCKETS, **options},
    )  # fmt: skip


def open_cpu(path: Path) -> LLM:
    return load(path, device="cpu", kv_cache_tokens=8192, max_batch=9)


def tokens_of(llm: LLM, prompts: list[str], params: SamplingParams) -> list[tuple[int, ...]]:
    return [answer.token_ids for answer in llm.generate(prompts, params)]


@pytest.mark.parametrize("graph", [False, True])
def test_prefetching_changes_no_token(checkpoints: dict[str, Path], graph: bool) -> None:
    """Nine prompts: the batch shrinks from 9 (beyond the buckets) over every bucket border."""
    llm = open_npu(checkpoints["w8a8"], graph=graph, prefetch="auto")
    params = SamplingParams(max_new_tokens=40)
    expected = tokens_of(open_cpu(checkpoints["w8a8"]), PROMPTS, params)
    assert len({len(tokens) for tokens in expected}) > 2  # the batch does shrink
    assert tokens_of(llm, PROMPTS, params) == expected


@pytest.mark.parametrize("recipe", ["w8a8-static", "w4a8-plain"])
@pytest.mark.parametrize("graph", [False, True])
def test_tokens_of_each_recipe(checkpoints: dict[str, Path], recipe: str, graph: bool) -> None:
    """Equal, but that one answer of nine with w4a8 may go on with a token that the CPU found as
    probable, to the last bit of a logit."""
    params = SamplingParams(max_new_tokens=40, logprobs=2)
    expected = open_cpu(checkpoints[recipe]).generate(PROMPTS, params)
    actual = open_npu(checkpoints[recipe], graph=graph).generate(PROMPTS, params)
    ties = 0
    for mine, other in zip(actual, expected, strict=True):
        same = first_difference(mine.token_ids, other.token_ids)
        if same == len(other.token_ids) == len(mine.token_ids):
            continue
        assert other.logprobs is not None
        (first, most), (second, nearly) = other.logprobs[same].top
        assert {mine.token_ids[same], other.token_ids[same]} == {first, second}
        assert most - nearly <= LOGIT_UNIT
        ties += 1
    assert ties <= (1 if recipe == "w4a8-plain" else 0)
    assert len({answer.token_ids for answer in expected}) == len(PROMPTS)


@pytest.mark.parametrize("attention", ["fused", "paged"])
def test_hundreds_of_captured_steps_across_block_borders(
    checkpoints: dict[str, Path], attention: str
) -> None:
    """Prompts of 120 and 250 tokens, blocks of 128: both cross a border while decoding."""
    text = (Path(__file__).parent.parent / "data/tiny-qwen3/heldout.txt").read_text()
    cpu = open_cpu(checkpoints["w8a8"])
    ids = cpu.tokenizer.encode(text[:4000])
    prompts = [ids[:120], ids[300:550]]
    params = SamplingParams(max_new_tokens=200, ignore_eos=True)
    expected = [answer.token_ids for answer in cpu.generate(prompts, params)]
    llm = open_npu(checkpoints["w8a8"], attention=attention)
    actual = [answer.token_ids for answer in llm.generate(prompts, params)]
    same = [first_difference(*pair) for pair in zip(actual, expected, strict=True)]
    assert same == [200, 200]


@pytest.mark.parametrize("recipe", ["w8a8", "bf16", "w8a8-static", "w4a8-plain"])
def test_logits_of_a_chunked_prefill(checkpoints: dict[str, Path], recipe: str) -> None:
    text = (Path(__file__).parent.parent / "data/tiny-qwen3/heldout.txt").read_text()
    cpu = open_cpu(checkpoints[recipe])
    ids = cpu.tokenizer.encode(text[:2000])[:200]
    llm = open_npu(checkpoints[recipe], graph=False, step_tokens=64)
    expected, actual = cpu.logits(ids), llm.logits(ids)
    assert (actual - expected).abs().max() < LOGIT_BOUND
    assert expected.abs().max() > 10 * LOGIT_BOUND  # the bound means something
    agree = (actual.argmax(-1) == expected.argmax(-1)).float().mean()
    assert agree > 0.97


def test_auto_takes_the_npu_and_float32_the_cpu(checkpoints: dict[str, Path]) -> None:
    params = SamplingParams(max_new_tokens=4)
    import ascend_sim

    load(checkpoints["w8a8"], kv_cache_tokens=1024, graph=False).generate(["river"], params)
    assert ascend_sim.trace.launches()
    ascend_sim.reset_trace()
    load(checkpoints["w8a8"], dtype="float32", kv_cache_tokens=1024).generate(["river"], params)
    assert not ascend_sim.trace.launches()


def first_difference(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    pairs = enumerate(zip(left, right, strict=True))
    return next((at for at, (a, b) in pairs if a != b), len(left))


torch.set_num_threads(1)  # the matrices are tiny: more threads only wait for each other
