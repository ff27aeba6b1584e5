"""Keys and values kept as int8: what they decode to, what it changes, and what it does not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from support.command_line import run
from torch import Tensor

from qwen3_ascend import SamplingParams, load
from qwen3_ascend.errors import OptionError
from qwen3_ascend.runtime import LLM, backends
from qwen3_ascend.runtime.backends.base import Backend, StepBounds
from qwen3_ascend.runtime.backends.cache import LayerKV
from qwen3_ascend.runtime.conformance import cases
from qwen3_ascend.runtime.engine.batch import Batch, Chunk, step_inputs
from qwen3_ascend.runtime.engine.request import Request
from qwen3_ascend.runtime.engine.scheduler import Scheduler
from qwen3_ascend.runtime.options import DeviceOptions
from qwen3_ascend.runtime.synthetic import SMALL_CONFIG

ODD = dataclasses.replace(SMALL_CONFIG, num_heads=6, num_kv_heads=2, head_dim=36)
BLOCK, TOKENS = 16, 40

WORDS = ["river", "bicycle", "oxygen", "house", "mountain", "music", "doctor", "window"]
GREEDY = SamplingParams(max_new_tokens=40, ignore_eos=True)


def written(backend: Backend[LayerKV]) -> LayerKV:
    """The cache of a layer after a step of 40 tokens, one of which is of zeros."""
    (cache, *_) = backend.allocate_cache(StepBounds(1, BLOCK, 4))
    request = Request(0, SamplingParams(), [0] * TOKENS, TOKENS, TOKENS, frozenset())
    request.block_table = [3, 1, 2]
    step = backend.open_step(step_inputs(Batch((Chunk.next_of(request, TOKENS),)), BLOCK))
    random = torch.Generator().manual_seed(0)
    heads = ODD.num_heads + 2 * ODD.num_kv_heads
    qkv = torch.randn(TOKENS, heads * ODD.head_dim, generator=random)
    qkv[7] = 0
    ones = torch.ones(ODD.head_dim)
    backend.norm_rope_write(backend.upload(qkv), ones, ones, 1e-6, step, cache)
    return cache


def decoded(codes: Tensor, scales: Tensor | None) -> Tensor:
    assert scales is not None and codes.dtype == torch.int8
    return codes.double() * scales[..., None]


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_a_code_is_the_nearest(device: str) -> None:
    """Each token and head has a scale of its own, which maps its largest magnitude onto 127."""
    floats = written(backends.reference_backend(ODD, "float32"))
    cache = written(
        backends.get(ODD, DeviceOptions("cpu", "float32", kv_cache_dtype="int8"))
        if device == "cpu"
        else backends.reference_backend(ODD, "float32", "int8")
    )
    slots = torch.cat([torch.arange(16) + 48, torch.arange(16) + 16, torch.arange(8) + 32])
    for exact, codes, scales in (
        (floats.keys, cache.keys, cache.key_scales),
        (floats.values, cache.values, cache.value_scales),
    ):
        wanted = exact.flatten(0, 1)[slots].double()
        found = decoded(codes, scales).flatten(0, 1)[slots]
        largest = wanted.abs().amax(-1, keepdim=True)
        assert bool(((found - wanted).abs() <= largest / 127 * 0.5001).all())
        assert bool((found[7] == 0).all()) and bool((wanted[7] == 0).all())
        assert bool((codes.flatten(0, 1)[slots].abs().amax(-1)[torch.arange(40) != 7] == 127).all())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_cpu_is_the_reference(dtype: str) -> None:
    definition = backends.reference_backend(ODD, dtype, "int8")
    cpu = backends.get(ODD, DeviceOptions("cpu", dtype, kv_cache_dtype="int8"))
    (attention,) = (case for case in cases(definition, cpu, ODD) if case.name == "attention")
    compared = [*attention.compare()]
    assert len(compared) > 5 and [one for one in compared if not one.ok] == []


def test_half_the_memory() -> None:
    config = dataclasses.replace(SMALL_CONFIG, head_dim=128)
    options = DeviceOptions("cpu", kv_cache_dtype="int8")
    floats = backends.get(config, DeviceOptions("cpu"))
    int8 = backends.get(config, options)
    assert floats.cache_bytes_per_token() == 2 * config.num_layers * config.num_kv_heads * 256
    assert int8.cache_bytes_per_token() == 2 * config.num_layers * config.num_kv_heads * 132
    for backend in (floats, int8):
        caches = backend.allocate_cache(StepBounds(1, BLOCK, 5))
        held = [t for cache in caches for t in vars(cache).values() if t is not None]
        assert sum(t.nbytes for t in held) == backend.cache_bytes_per_token() * BLOCK * 5


def test_twice_the_tokens(tiny_bf16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fits by default follows from the bytes of a token."""
    from qwen3_ascend.runtime.backends.reference import ReferenceBackend

    monkeypatch.setattr(ReferenceBackend, "memory_for_cache", lambda self: 1 << 20)
    floats, int8 = (
        load(tiny_bf16, device="cpu", block_size=1, kv_cache_dtype=kind).longest
        for kind in ("auto", "int8")
    )
    config = load(tiny_bf16, device="cpu", kv_cache_tokens=128).config
    assert int8 / floats == pytest.approx(2 * config.head_dim / (config.head_dim + 4), rel=0.01)


@pytest.fixture(scope="module")
def llms(tiny_bf16: Path) -> tuple[LLM, LLM]:
    """The trained model in float32, with a cache of floats and one of int8."""
    floats, int8 = (
        load(tiny_bf16, device="cpu", dtype="float32", kv_cache_tokens=4096, kv_cache_dtype=kind)
        for kind in ("auto", "int8")
    )
    return floats, int8


def prompts(llm: LLM) -> list[list[int]]:
    return [llm.encode(f"What does {word} mean?") for word in WORDS]


def test_what_it_changes(llms: tuple[LLM, LLM]) -> None:
    """Over the answers of the trained model the distributions of the next token differ by less
    than a ten-thousandth of a nat, and the likeliest token is nearly always the same."""
    floats, int8 = llms
    divergences, agreed = [], []
    for answer in floats.generate(prompts(floats), GREEDY):
        tokens = [*answer.prompt_token_ids, *answer.token_ids]
        expected, found = (llm.logits(tokens).double().log_softmax(-1) for llm in llms)
        divergences.append((expected.exp() * (expected - found)).sum(-1))
        agreed.append(expected.argmax(-1) == found.argmax(-1))
    mean = float(torch.cat(divergences).mean())
    assert 0 < mean < 1e-4
    assert float(torch.cat(agreed).double().mean()) > 0.99
    assert int8.generate(prompts(int8)[:1], GREEDY) == floats.generate(prompts(floats)[:1], GREEDY)


def test_preemption_prefixes_and_chunks_change_nothing(
    tiny_bf16: Path, llms: tuple[LLM, LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers that share a cache which is too small for them, against each by itself."""
    alone = [llms[1].generate([prompt], GREEDY)[0].token_ids for prompt in prompts(llms[1])]
    preempted, preempt = [], Scheduler._preempt

    def watched(scheduler: Scheduler, request: Request) -> None:
        preempted.append(request)
        preempt(scheduler, request)

    monkeypatch.setattr(Scheduler, "_preempt", watched)
    for prefix_cache in (True, False):
        small = load(
            tiny_bf16, device="cpu", dtype="float32", block_size=8, kv_cache_tokens=160,
            step_tokens=24, prefix_cache=prefix_cache, kv_cache_dtype="int8",
        )  # fmt: skip
        answers = small.generate(prompts(small), GREEDY)
        assert [answer.token_ids for answer in answers] == alone
        assert preempted
        preempted.clear()


def test_no_npu_has_it(tiny_bf16: Path) -> None:
    """It is said before the weights are read, and before torch_npu is asked for."""
    with pytest.raises(OptionError, match="kv_cache_dtype: .*TND.*device=cpu"):
        backends.get(SMALL_CONFIG, DeviceOptions("npu", kv_cache_dtype="int8"))
    done = run(
        "generate", tiny_bf16, "--device", "npu", "--kv-cache-dtype", "int8", "--prompt", "Hello"
    )
    done.one_line_error("kv_cache_dtype", "npu", "device=cpu")


def test_other_types() -> None:
    with pytest.raises(OptionError, match="kv_cache_dtype"):
        DeviceOptions(kv_cache_dtype="fp8")
