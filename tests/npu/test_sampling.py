"""Sampling on the device gives the CPU's tokens and copies next to nothing to the host.

Real torch_npu on a simulated device, whose topk takes other ones of equal logits than a CPU does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ascend_sim
import pytest
import torch
import torch_npu
from torch import Tensor

from qwen3_ascend import SamplingParams, load
from qwen3_ascend.runtime.backends.npu.device import open_device
from qwen3_ascend.runtime.doctor import sampling
from qwen3_ascend.runtime.doctor.recorder import Recorder
from qwen3_ascend.runtime.engine import candidates
from qwen3_ascend.runtime.engine.request import Request
from qwen3_ascend.runtime.engine.sampler import Choice, Sampler

pytestmark = pytest.mark.opposite_modes

VOCABULARY = 151936  # of Qwen3
QWEN3 = SamplingParams(temperature=0.6, top_k=20, top_p=0.95, seed=1)

PARAMS = (
    SamplingParams(),
    QWEN3,
    SamplingParams(repetition_penalty=1.3, presence_penalty=0.5),
    SamplingParams(temperature=1.2, seed=2),
    SamplingParams(temperature=1.0, top_p=0.9, seed=3, repetition_penalty=1.1),
    SamplingParams(temperature=1.0, min_p=0.05, seed=4, presence_penalty=1.0),
    SamplingParams(temperature=0.8, top_k=50, seed=5, logprobs=3),
    SamplingParams(logprobs=0),
)


@pytest.fixture(autouse=True)
def _device() -> None:
    open_device()


def logits(seed: int, rows: int, vocabulary: int) -> Tensor:
    """Rounded to bfloat16, as those of a head are: many are equal."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocabulary, generator=generator) * 3).bfloat16().float()


def requests(params: Sequence[SamplingParams]) -> list[Request]:
    return [
        Request(number, one, [1, 2 + number], 2, 1000, frozenset())
        for number, one in enumerate(params)
    ]


def steps(device: str, count: int, vocabulary: int) -> list[list[Choice]]:
    """What a batch with all kinds of parameters says, step by step."""
    sampler, batch, said = Sampler(), requests(PARAMS), []
    for step in range(count):
        said.append(sampler(logits(step, len(PARAMS), vocabulary).to(device), batch))
        for request, choice in zip(batch, said[-1], strict=True):
            request.append(choice.token)
    return said


@pytest.mark.parametrize(("vocabulary", "count"), [(300, 30), (VOCABULARY, 3)])
def test_tokens_are_those_of_the_cpu(vocabulary: int, count: int) -> None:
    assert steps("npu", count, vocabulary) == steps("cpu", count, vocabulary)


def test_whole_rows_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few candidates that most tokens need their whole row."""
    expected = steps("npu", 20, 300)
    monkeypatch.setattr(candidates, "WITHOUT_TOP_K", 5)
    monkeypatch.setattr(candidates, "MOST", 5)
    assert steps("npu", 20, 300) == expected


def copied(params: Sequence[SamplingParams]) -> list[int]:
    """Bytes of each copy to the host when a batch of Qwen3's vocabulary gets its tokens."""
    rows, batch = logits(0, len(params), VOCABULARY).to("npu"), requests(params)
    rows[:, :30] += 20 - torch.arange(30, device="npu")  # some that stand out, as in a real row
    torch_npu.npu.synchronize()
    ascend_sim.reset_trace()
    Sampler()(rows, batch)
    return [copy.bytes for copy in ascend_sim.trace.copies("device_to_host")]


def test_half_a_kilobyte_comes_to_the_host_for_each_token() -> None:
    assert copied([QWEN3]) == [64 * 8]  # instead of 607744 bytes
    assert copied([QWEN3] * 5) == [5 * 64 * 8]


def test_a_copy_for_all_candidates_and_one_for_the_greedy_rows() -> None:
    without_top_k = SamplingParams(temperature=0.6, top_p=0.95, seed=1)
    greedy = SamplingParams(repetition_penalty=1.5)
    assert copied([QWEN3, without_top_k]) == [2 * (1024 * 8 + 4)]
    assert copied([SamplingParams(), greedy]) == [2 * 8]
    assert copied([QWEN3, greedy]) == [8, 64 * 8]


def test_whole_rows_only_for_those_who_want_logarithms() -> None:
    report = SamplingParams(logprobs=2)
    assert copied([report, QWEN3, QWEN3]) == [8, 2 * 64 * 8, 4 * VOCABULARY]


def examined() -> dict[str, str]:
    recorder = Recorder(lambda check: None)
    sampling.examine(recorder, 2000)
    return {check.name: check.status for check in recorder.checks}


def test_the_doctor_finds_nothing_wrong() -> None:
    assert set(examined().values()) == {"ok"}


def test_the_doctor_finds_a_wrong_sum_and_a_wrong_topk(monkeypatch: pytest.MonkeyPatch) -> None:
    topk, rest = Tensor.topk, candidates._rest

    def without_the_greatest(rows: Tensor, count: int) -> tuple[Tensor, ...]:
        skipped = int(rows.device.type == "npu")
        return tuple(part[:, skipped:].contiguous() for part in topk(rows, count + skipped))

    with monkeypatch.context() as patch:
        patch.setattr(candidates, "_rest", lambda *given: rest(*given) * 1.001)
        assert examined()["sum over the vocabulary"] == "failed"
    monkeypatch.setattr(Tensor, "topk", without_the_greatest)
    wrong = {name for name, status in examined().items() if status == "failed"}
    assert {"temperature, top_k and top_p", "top_p", "temperature"} <= wrong


class Watched(Sampler):
    """Says what the device's logits come to, and asks a CPU's sampler for the same."""

    def __init__(self) -> None:
        super().__init__()
        self._on_cpu = Sampler()
        self.tokens = 0

    def __call__(self, logits: Tensor, requests: Sequence[Request]) -> list[Choice]:
        choices = super().__call__(logits, requests)
        assert logits.device.type == "npu"
        assert choices == self._on_cpu(logits.cpu(), requests)
        self.tokens += len(choices)
        return choices


def test_a_model_that_is_sampled_from(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token is the CPU's for the same logits, and seeds repeat."""
    llm = load(checkpoints["w8a8"], device="npu", kv_cache_tokens=4096, max_batch=4)
    prompts = [f"What does {word} mean?" for word in ("river", "house", "music")]
    params = [
        SamplingParams(temperature=1.0, top_k=20, top_p=0.95, seed=7, max_new_tokens=25),
        SamplingParams(temperature=1.3, seed=8, max_new_tokens=25, repetition_penalty=1.1),
        SamplingParams(max_new_tokens=25, presence_penalty=0.5),
    ]
    monkeypatch.setattr(llm._engine, "_sampler", watched := Watched())
    together = [answer.token_ids for answer in llm.generate(prompts, params)]
    assert watched.tokens == sum(map(len, together))
    assert [answer.token_ids for answer in llm.generate(prompts, params)] == together
    assert len(set(together)) == 3
