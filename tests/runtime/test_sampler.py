"""The tokens of a batch: greedy, drawn, penalized, with logarithms of probabilities."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen3_ascend import SamplingParams
from qwen3_ascend.errors import RequestError
from qwen3_ascend.runtime.engine import candidates
from qwen3_ascend.runtime.engine.request import Request
from qwen3_ascend.runtime.engine.sampler import Choice, Sampler, draw_from_row, is_plain_greedy

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


def numbers(params: SamplingParams, count: int) -> list[float]:
    """The first random numbers of a request with a seed."""
    generator = torch.Generator().manual_seed(params.seed or 0)
    return [float(torch.rand((), dtype=torch.float64, generator=generator)) for _ in range(count)]


@pytest.mark.parametrize("count", [1, 3, 7, 1024])
def test_how_many_candidates_are_asked_for_changes_no_token(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """With few of them, nearly every token needs its whole row."""
    monkeypatch.setattr(candidates, "WITHOUT_TOP_K", count)
    monkeypatch.setattr(candidates, "MOST", count)
    rows = logits(8, rows=3, scale=2.0).mul(2).round().div(2)  # many equal ones
    params = [
        SamplingParams(temperature=0.8, seed=1, top_k=5, top_p=0.9),
        SamplingParams(temperature=1.3, seed=2),
        SamplingParams(temperature=1.0, seed=3, top_p=0.8, min_p=0.01),
    ]
    sampler, batch = Sampler(), [sequence(one, number) for number, one in enumerate(params)]
    steps = [tokens(sampler(rows, batch)) for _ in range(60)]
    for row, one in enumerate(params):
        expected = [draw_from_row(rows[row], one, number) for number in numbers(one, 60)]
        assert [step[row] for step in steps] == expected
        assert len(set(expected)) > 3


def test_one_random_number_a_token() -> None:
    """Whatever the filters leave, so that they do not shift the numbers of later tokens."""
    row, one = logits(9), SamplingParams(temperature=1.0, seed=4)
    sampler, request = Sampler(), sequence(one)
    sampler(row, [replace_params(request, top_k=1)])
    sampler(row, [replace_params(request, top_p=1e-6)])
    assert sampler(row, [request])[0].token == draw_from_row(row[0], one, numbers(one, 3)[-1])


def replace_params(request: Request, **changes: Any) -> Request:
    return replace(request, params=replace(request.params, **changes))


def test_frequencies_follow_the_probabilities() -> None:
    row = logits(7, scale=1.0)
    params = SamplingParams(temperature=1.0, seed=5, top_k=5)
    kept = row[0].masked_fill(row[0] < row[0].topk(5).values[-1], -torch.inf)
    probabilities = kept.softmax(dim=-1)
    count = 4000
    counts = torch.bincount(torch.tensor(draws(params, count, row)), minlength=VOCABULARY)
    assert bool((counts[probabilities == 0] == 0).all())
    # The seed is fixed, so this cannot flicker; five standard deviations say it is no accident.
    deviation = (count * probabilities * (1 - probabilities)).sqrt()
    assert bool(((counts - count * probabilities).abs() <= 5 * deviation).all())


def test_logarithms_are_those_before_penalties_and_filters() -> None:
    rows = logits(10, rows=4)
    params = [
        SamplingParams(),
        SamplingParams(presence_penalty=100.0, logprobs=3),
        SamplingParams(temperature=1.0, seed=1, top_k=2),
        SamplingParams(temperature=1.0, seed=1, top_k=2, logprobs=0),
    ]
    output = tuple(int(row.argmax()) for row in rows)
    batch = [sequence(one, at, output=(output[at],)) for at, one in enumerate(params)]
    choices = Sampler()(rows, batch)
    assert [choice.logprobs is not None for choice in choices] == [False, True, False, True]
    for row, choice, one in zip(rows, choices, params, strict=True):
        if choice.logprobs is not None:
            logarithms = row.log_softmax(dim=-1)
            assert choice.logprobs.chosen == float(logarithms[choice.token])
            assert [t for t, _ in choice.logprobs.top] == row.topk(one.logprobs or 0)[1].tolist()


def test_logits_that_are_no_numbers_are_an_error() -> None:
    row = logits(0)
    row[0, 7] = torch.nan
    with pytest.raises(FloatingPointError, match="no finite numbers"):
        Sampler()(row, [sequence(SamplingParams(temperature=1.0))])


def test_what_is_plain_greedy() -> None:
    assert is_plain_greedy(SamplingParams(top_k=3, top_p=0.5, seed=1))
    others: list[dict[str, Any]] = [
        {"temperature": 0.1}, {"repetition_penalty": 1.1}, {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5}, {"logprobs": 0},
    ]  # fmt: skip
    assert not any(is_plain_greedy(SamplingParams(**other)) for other in others)


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": float("inf")},
        {"top_k": -1}, {"top_k": 2.5}, {"top_p": 0.0}, {"top_p": 1.01}, {"top_p": float("nan")},
        {"min_p": -0.1}, {"min_p": 1.1}, {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")}, {"presence_penalty": float("nan")},
        {"presence_penalty": float("-inf")}, {"frequency_penalty": float("nan")},
        {"max_new_tokens": 0}, {"stop": ""},
        {"stop": ("a", "")}, {"seed": 2**64}, {"seed": -(2**63) - 1},
    ],
    ids=str,
)  # fmt: skip
def test_values_out_of_range(bad: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(bad))):
        SamplingParams(**bad)
