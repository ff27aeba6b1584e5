"""Whether the device's part of sampling leads to the tokens that the host alone comes to."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from qwen3_ascend.runtime.doctor.recorder import Recorder
from qwen3_ascend.runtime.doctor.report import Check, Status
from qwen3_ascend.runtime.engine.candidates import REST_ERROR, WITHOUT_TOP_K, greatest
from qwen3_ascend.runtime.engine.request import Request, SamplingParams
from qwen3_ascend.runtime.engine.sampler import Sampler

SETTINGS = {
    "greedy": SamplingParams(),
    "greedy with penalties": SamplingParams(repetition_penalty=1.3, presence_penalty=0.5),
    "temperature, top_k and top_p": SamplingParams(temperature=0.6, top_k=20, top_p=0.95, seed=1),
    "top_p": SamplingParams(temperature=1.0, top_p=0.9, seed=2),
    "temperature": SamplingParams(temperature=1.0, seed=3),
    "min_p with penalties": SamplingParams(
        temperature=1.0, min_p=0.05, seed=4, repetition_penalty=1.1
    ),
}

AREA = "sampling"
SUM = "sum over the vocabulary"

ROWS = 4
STEPS = 8


def examine(recorder: Recorder, vocabulary: int, device: str = "npu") -> None:
    """Each kind of sampling over a vocabulary of this size, and the sum that some of them need."""
    for name, params in SETTINGS.items():
        recorder.run(AREA, name, functools.partial(_same_tokens, name, params, vocabulary, device))
    recorder.run(AREA, SUM, functools.partial(_exact_sum, vocabulary, device))


def _same_tokens(
    name: str, params: SamplingParams, vocabulary: int, device: str
) -> Iterator[Check]:
    with torch.inference_mode():
        expected, actual = (_tokens(params, vocabulary, where) for where in ("cpu", device))
    wrong = sum(one != other for one, other in zip(expected, actual, strict=True))
    status: Status = "failed" if wrong else "ok"
    detail = f"{wrong} of {len(expected)} tokens are not those of the host" if wrong else ""
    yield Check(AREA, name, status, detail)


def _exact_sum(vocabulary: int, device: str) -> Iterator[Check]:
    with torch.inference_mode():
        error = _rest_error(vocabulary, device)
    status: Status = "ok" if error <= REST_ERROR else "failed"
    yield Check(AREA, SUM, status, f"{error:.2g}, allowed {REST_ERROR:.2g}")


def _tokens(params: SamplingParams, vocabulary: int, device: str) -> list[int]:
    """What ROWS requests say in STEPS steps."""
    sampler = Sampler()
    requests = [
        Request(number, params, [number, 1], 2, vocabulary, frozenset()) for number in range(ROWS)
    ]
    for step in range(STEPS):
        choices = sampler(_logits(step, vocabulary).to(device), requests)
        for request, choice in zip(requests, choices, strict=True):
            request.append(choice.token)
    return [token for request in requests for token in request.output]


def _rest_error(vocabulary: int, device: str) -> float:
    """Largest relative error of the weight of what is not among the candidates."""
    logits = _logits(0, vocabulary)
    params, count = [SamplingParams(temperature=1.0)] * ROWS, min(WITHOUT_TOP_K, vocabulary // 2)
    found = greatest(logits.to(device), params, count)
    last = found.logits[:, -1:]
    exact = (logits.double() - last).masked_fill(logits > last, -torch.inf).exp().sum(dim=1)
    return float((found.rest / exact - 1).abs().max())


def _logits(seed: int, vocabulary: int) -> Tensor:
    """[ROWS, vocabulary], rounded to bfloat16 as those of a head are: many are equal."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(ROWS, vocabulary, generator=generator) * 3).bfloat16().float()
