"""The NPU backend says what the CPU backend says: real torch_npu on a simulated device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qwen3_ascend import SamplingParams, load
from qwen3_ascend.runtime import LLM

pytestmark = pytest.mark.opposite_modes

WORDS = ("river", "bicycle", "house", "oxygen", "create", "water", "mountain", "teacher", "music")
PROMPTS = [f"What does {word} mean?" for word in WORDS]
BUCKETS = (1, 2, 4, 8)


def open_npu(path: Path, **options: Any) -> LLM:
    return load(
        path, device="npu", block_size=128, kv_cache_tokens=8192, max_batch=9,
        **{"buckets": BUCKETS, **options},
    )  # fmt: skip


def open_cpu(path: Path, **options: Any) -> LLM:
    return load(path, device="cpu", kv_cache_tokens=8192, max_batch=9, **options)


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
def test_tokens_of_integer_schemes(checkpoints: dict[str, Path], recipe: str, graph: bool) -> None:
    """The batch shrinks, so that graphs are padded; see also test_recipes.py."""
    params = SamplingParams(max_new_tokens=40)
    expected = tokens_of(open_cpu(checkpoints[recipe]), PROMPTS, params)
    llm = open_npu(checkpoints[recipe], graph=graph)
    assert tokens_of(llm, PROMPTS, params) == expected
    assert len(set(expected)) == len(PROMPTS)


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
    """All bits of them: the simulated device adds up in the order of the CPU."""
    text = (Path(__file__).parent.parent / "data/tiny-qwen3/heldout.txt").read_text()
    cpu = open_cpu(checkpoints[recipe], step_tokens=64)
    ids = cpu.tokenizer.encode(text[:2000])[:200]
    llm = open_npu(checkpoints[recipe], graph=False, step_tokens=64)
    assert torch.equal(llm.logits(ids), cpu.logits(ids))


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
