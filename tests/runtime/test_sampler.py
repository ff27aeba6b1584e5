"""How a token is chosen, held against transformers' own filters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qwen3_ascend import SamplingParams
from qwen3_ascend.errors import RequestError
from qwen3_ascend.runtime.engine.request import Request
from qwen3_ascend.runtime.engine.sampler import Choice, Sampler, candidate_probabilities, penalize

VOCABULARY = 50


def logits(seed: int, scale: float = 3.0, rows: int = 1) -> Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * scale


def sequence(
    params: SamplingParams,
    number: int = 0,
    prompt: tuple[int, ...] = (1, 2),
    output: tuple[int, ...] = (),
) -> Request:
    tokens = [*prompt, *output]
    return Request(number, params, tokens, len(prompt), 1000, frozenset())


def tokens(choices: list[Choice]) -> list[int]:
    return [choice.token for choice in choices]


PARAMS = st.builds(
    SamplingParams,
    temperature=st.floats(0.1, 3),
    top_k=st.sampled_from([0, 1, 2, 7, 49, 50, 51, 1000]),
    top_p=st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 1e-3, 0.1, 0.7, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.3, 5.0]),
)


@settings(max_examples=300)
@given(
    params=PARAMS,
    seed=st.integers(0, 1000),
    prompt=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=8).map(tuple),
    output=st.lists(st.integers(0, VOCABULARY - 1), max_size=8).map(tuple),
)
def test_filters_are_those_of_transformers(
    params: SamplingParams, seed: int, prompt: tuple[int, ...], output: tuple[int, ...]
) -> None:
    row = logits(seed)[0]
    theirs = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.repetition_penalty != 1.0:
        theirs.insert(0, RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.top_k:
        theirs.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        theirs.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0.0:
        theirs.append(MinPLogitsWarper(params.min_p))
    expected = theirs(torch.LongTensor([[*prompt, *output]]), row[None]).softmax(dim=-1)[0]
    request = sequence(params, prompt=prompt, output=output)
    actual = candidate_probabilities(penalize(row, request), params)
    assert torch.equal(actual > 0, expected > 0), "another set of candidates"
    assert torch.allclose(actual, expected, atol=1e-6, rtol=1e-5)
    assert float(actual.sum()) == pytest.approx(1.0, abs=1e-5)


def test_penalties_do_not_change_the_logits_they_are_given() -> None:
    row = logits(0)[0]
    before = row.clone()
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=1.0)
    penalize(row, sequence(params, output=(5, 5, 7)))
    assert torch.equal(row, before)


def test_presence_penalty_counts_each_output_token_once() -> None:
    row = logits(1)[0]
    params = SamplingParams(presence_penalty=1.5)
    done = penalize(row, sequence(params, prompt=(3, 4), output=(5, 5, 5, 7)))
    expected = row.clone()
    expected[[5, 7]] -= 1.5
    assert torch.equal(done, expected)
    assert torch.equal(penalize(row, sequence(params, prompt=(3, 4))), row)


def test_the_most_probable_token_always_stays() -> None:
    for seed in range(50):
        row = logits(seed)[0]
        params = SamplingParams(temperature=1.0, top_k=1, top_p=1e-9, min_p=1.0)
        chosen = candidate_probabilities(row, params)
        assert chosen.nonzero().flatten().tolist() == [int(row.argmax())]


def test_greedy() -> None:
    row = logits(3)
    assert tokens(Sampler()(row, [sequence(SamplingParams())])) == [int(row.argmax())]
    best = int(row.argmax())
    push = SamplingParams(presence_penalty=100.0)
    assert tokens(Sampler()(row, [sequence(push, output=(best,))])) == [
        int(row[0].topk(2).indices[1])
    ]


def draws(params: SamplingParams, count: int, row: Tensor) -> list[int]:
    sampler, request = Sampler(), sequence(params)
    return [sampler(row, [request])[0].token for _ in range(count)]


def test_a_seed_repeats() -> None:
    row = logits(4)
    params = SamplingParams(temperature=1.5, seed=11)
    first = draws(params, 40, row)
    assert first == draws(params, 40, row)
    assert len(set(first)) > 5
    assert first != draws(replace(params, seed=12), 40, row)
    fresh = replace(params, seed=None)
    assert draws(fresh, 40, row) != draws(fresh, 40, row)


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 - 1, -(2**63)])
def test_seeds_of_64_bits(seed: int) -> None:
    params = SamplingParams(temperature=1.0, seed=seed)
    assert draws(params, 5, logits(0)) == draws(params, 5, logits(0))


def test_forgetting_starts_anew() -> None:
    row, params = logits(5), SamplingParams(temperature=1.0, seed=3)
    sampler, request = Sampler(), sequence(params)
    first = [sampler(row, [request])[0] for _ in range(5)]
    sampler.forget(request.number)
    assert [sampler(row, [request])[0] for _ in range(5)] == first


def test_a_batch_draws_what_each_draws_alone() -> None:
    rows = logits(6, rows=4)
    params = [
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(),
        SamplingParams(temperature=2.0, seed=2, top_k=10, repetition_penalty=1.2),
        SamplingParams(temperature=0.7, seed=1, min_p=0.01),
    ]
    together = Sampler()
    batch = [sequence(chosen, number) for number, chosen in enumerate(params)]
    drawn = [together(rows, batch) for _ in range(20)]
    for number, chosen in enumerate(params):
        alone, request = Sampler(), sequence(chosen, number)
        expected = [alone(rows[number : number + 1], [request])[0] for _ in range(20)]
        assert [step[number] for step in drawn] == expected


def test_frequencies_follow_the_probabilities() -> None:
    row = logits(7, scale=1.0)
    params = SamplingParams(temperature=1.0, seed=5, top_k=5)
    probabilities = candidate_probabilities(row[0], params)
    count = 4000
    counts = torch.bincount(torch.tensor(draws(params, count, row)), minlength=VOCABULARY)
    assert bool((counts[probabilities == 0] == 0).all())
    # The seed is fixed, so this cannot flicker; five standard deviations say it is no accident.
    deviation = (count * probabilities * (1 - probabilities)).sqrt()
    assert bool(((counts - count * probabilities).abs() <= 5 * deviation).all())


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": float("inf")},
        {"top_k": -1}, {"top_k": 2.5}, {"top_p": 0.0}, {"top_p": 1.01}, {"top_p": float("nan")},
        {"min_p": -0.1}, {"min_p": 1.1}, {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")}, {"presence_penalty": float("nan")},
        {"presence_penalty": float("-inf")}, {"max_new_tokens": 0}, {"stop": ""},
        {"stop": ("a", "")}, {"seed": 2**64}, {"seed": -(2**63) - 1},
    ],
    ids=str,
)  # fmt: skip
def test_values_out_of_range(bad: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(bad))):
        SamplingParams(**bad)
