"""Filters held against transformers', and candidates against whole rows: token for token."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qwen3_ascend import SamplingParams
from qwen3_ascend.runtime.engine.candidates import (
    REST_ERROR,
    Candidates,
    Rows,
    choose,
    enough,
    greatest,
    whole_row,
)

VOCABULARY = 50
QWEN3 = 151936
LAST_NUMBER = 1 - 2.0**-53

PARAMS = st.builds(
    SamplingParams,
    temperature=st.floats(0.1, 3),
    top_k=st.sampled_from([0, 1, 2, 7, 49, 50, 51, 1000]),
    top_p=st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 1e-3, 0.1, 0.7, 1.0]),
)


def logits(seed: int, vocabulary: int = VOCABULARY, step: float = 0.0) -> Tensor:
    """A row; with a step, of its multiples only, so that many are equal."""
    row = torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed)) * 3
    return (row / step).round() * step if step else row


def text_like(seed: int) -> Tensor:
    """A row of Qwen3's size that falls off as those of a language model do, as bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.randperm(QWEN3, generator=generator) + 1
    noise = torch.randn(QWEN3, generator=generator)
    return (20 - 1.2 * ranks.log() + 0.5 * noise).bfloat16().float()


def of_transformers(row: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities [vocab] by transformers' own processors."""
    theirs = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        theirs.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        theirs.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0.0:
        theirs.append(MinPLogitsWarper(params.min_p))
    filtered: Tensor = theirs(torch.LongTensor([[0]]), row[None].clone())
    return filtered.softmax(dim=-1)[0]


def probabilities(row: Tensor, params: SamplingParams) -> Tensor:
    """Ours [vocab], float64."""
    rows = Rows(whole_row(row), [params])
    kept, known = rows.kept()
    assert bool(known.all()) and torch.equal(kept.least, kept.most)
    stays = rows.before < kept.most[:, None]
    shares = (rows.weights / kept.most[:, None]).where(stays, 0)[0]
    return torch.zeros_like(shares).index_copy(0, rows.tokens[0], shares)


@settings(max_examples=300)
@given(params=PARAMS, seed=st.integers(0, 1000))
def test_filters_are_those_of_transformers(params: SamplingParams, seed: int) -> None:
    row = logits(seed)
    expected, actual = of_transformers(row, params), probabilities(row, params)
    # Below 1e-12 a weight may vanish in the sum of those before it: no number falls on it.
    assert bool((actual[expected > 1e-12] > 0).all()), "a token is missing"
    assert bool((actual[expected == 0] == 0).all()), "a token should have been dropped"
    assert torch.allclose(actual.float(), expected, atol=1e-6, rtol=1e-5)
    assert float(actual.sum()) == pytest.approx(1.0, abs=1e-12)


@settings(max_examples=200)
@given(params=PARAMS, seed=st.integers(0, 1000), step=st.sampled_from([0.5, 1.0]))
def test_with_equal_logits_too(params: SamplingParams, seed: int, step: float) -> None:
    """Which of the equal ones a top_p keeps is not defined there, so sizes are compared."""
    row = logits(seed, step=step)
    if params.min_p * params.temperature and step % params.temperature == 0:
        return
    expected, actual = of_transformers(row, params), probabilities(row, params)
    assert torch.allclose(actual.float().sort()[0], expected.sort()[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.6, "top_k": 20, "top_p": 0.95},  # Qwen3's, thinking
        {"temperature": 0.7, "top_k": 20, "top_p": 0.8},  # and not thinking
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 1.0, "min_p": 0.05},
        {"temperature": 1.5, "top_k": 50},
        {"temperature": 1.0},
    ],
    ids=str,
)
def test_probabilities_of_a_large_vocabulary(changes: dict[str, Any]) -> None:
    params = SamplingParams(**changes)
    for seed in range(3):
        row = text_like(seed)
        expected, actual = of_transformers(row.double(), params), probabilities(row, params)
        assert torch.allclose(actual.sort()[0], expected.sort()[0], atol=1e-12, rtol=1e-9)
        assert float(actual.sum()) == pytest.approx(1.0, abs=1e-9)


@settings(max_examples=100)
@given(params=PARAMS, seed=st.integers(0, 1000), step=st.sampled_from([0.0, 0.5]))
def test_numbers_fall_on_tokens_as_often_as_they_are_probable(
    params: SamplingParams, seed: int, step: float
) -> None:
    """Evenly spread numbers, so each count is that of the probability, up to the two ends."""
    row, count = logits(seed, step=step), 500
    found = whole_row(row)
    many = Candidates(
        found.tokens.expand(count, -1), found.logits.expand(count, -1), torch.zeros(count), True
    )
    chosen = choose(many, [params] * count, [(at + 0.5) / count for at in range(count)])
    counts = torch.bincount(torch.tensor(chosen), minlength=VOCABULARY)
    assert ((counts - count * probabilities(row, params)).abs() < 1 + 1e-6).all()
    order = {token: place for place, token in enumerate(found.tokens[0].tolist())}
    places = [order[token] for token in chosen if token is not None]
    assert places == sorted(places), "a greater number means a less probable token"


def test_the_order_is_by_logit_and_then_by_token() -> None:
    row = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0])
    assert whole_row(row).tokens.tolist() == [[1, 3, 2, 4, 0]]
    params = SamplingParams(temperature=1.0, top_k=1)  # both that equal the greatest stay
    assert choose(whole_row(row), [params], [0.49]) == [1]
    assert choose(whole_row(row), [params], [0.51]) == [3]


def test_the_most_probable_token_always_stays() -> None:
    for seed in range(50):
        row = logits(seed)
        params = SamplingParams(temperature=1.0, top_k=1, top_p=1e-9, min_p=1.0)
        for number in (0.0, 0.5, LAST_NUMBER):
            assert choose(whole_row(row), [params], [number]) == [int(row.argmax())]


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-3, 1e6, 1e300])
@pytest.mark.parametrize("number", [0.0, 0.31, LAST_NUMBER])
def test_temperatures_without_bounds(temperature: float, number: float) -> None:
    row, params = logits(1), SamplingParams(temperature=temperature)
    expected = choose(whole_row(row), [params], [number])
    assert expected != [None]
    assert choose(greatest(row[None], [params], 20), [params], [number]) in ([None], expected)
    if temperature < 0.01:
        assert expected == [int(row.argmax())]
    else:
        assert expected == [whole_row(row).tokens[0, min(int(number * VOCABULARY), VOCABULARY - 1)]]


def border_numbers(row: Tensor, params: SamplingParams) -> list[float]:
    """Numbers at the borders between tokens, and the next ones on both sides."""
    rows = Rows(whole_row(row), [params])
    shares = (rows.before[0] / rows.kept()[0].most).tolist()
    near = [
        number
        for share in shares[:12]
        for number in (math.nextafter(share, 0), share, math.nextafter(share, 1), share + 1e-12)
    ]
    return [number for number in [*near, 0.0, LAST_NUMBER] if 0 <= number < 1]


def reversed_topk(self: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Another choice and order of equal values: the last ones, from the last on."""
    values, tokens = torch.topk(self.flip(-1), count)
    return values, self.shape[-1] - 1 - tokens


@pytest.mark.parametrize("other_topk", [False, True])
@settings(max_examples=150, deadline=None)
@given(
    params=st.lists(PARAMS, min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    step=st.sampled_from([0.0, 0.25, 1.0, 4.0]),
    vocabulary=st.sampled_from([50, 700]),
    count=st.sampled_from([1, 2, 8, 24, 49, 50]),
    error=st.sampled_from([-0.9, 0.0, 0.9]),
    numbers=st.lists(st.floats(0, LAST_NUMBER), min_size=4, max_size=4),
)
def test_candidates_say_what_the_whole_row_says(
    other_topk: bool, params: list[SamplingParams], seed: int, step: float, vocabulary: int,
    count: int, error: float, numbers: list[float],
) -> None:  # fmt: skip
    """Also for numbers on borders, and however inexact the device's sum is within its bound."""
    rows = torch.stack([logits(seed + at, vocabulary, step) for at in range(len(params))])
    with pytest.MonkeyPatch.context() as patch:
        if other_topk:
            patch.setattr(Tensor, "topk", reversed_topk)
        found = greatest(rows, params, count)
    inexact = Candidates(
        found.tokens, found.logits, found.rest * (1 + error * REST_ERROR), found.whole
    )
    lists = [[*numbers, *border_numbers(*pair)] for pair in zip(rows, params, strict=True)]
    for drawn in zip(*lists, strict=False):
        expected = [
            choose(whole_row(row), [one], [number])[0]
            for row, one, number in zip(rows, params, drawn, strict=True)
        ]
        said = choose(inexact, params, drawn)
        assert [token in (None, true) for token, true in zip(said, expected, strict=True)] == [
            True
        ] * len(params)
        if count == vocabulary:
            assert said == expected


GRID = list(itertools.product((0.6, 1.0), ((20, 0.95), (0, 0.9), (0, 1.0), (50, 1.0)), (0.0, 0.02)))


@pytest.mark.parametrize(("temperature", "top", "min_p"), GRID)
def test_candidates_suffice_nearly_always(
    temperature: float, top: tuple[int, float], min_p: float
) -> None:
    """Of rows like a language model's, whole ones are wanted about as often as a token is beyond
    the candidates; where the filters end before the last of them, for none."""
    params = SamplingParams(temperature=temperature, top_k=top[0], top_p=top[1], min_p=min_p)
    count, draws = enough(params), 200
    for seed in range(2):
        row = text_like(seed)
        found = greatest(row[None], [params], count)
        many = Candidates(
            found.tokens.expand(draws, -1), found.logits.expand(draws, -1),
            found.rest.expand(draws), False,
        )  # fmt: skip
        numbers = torch.rand(draws, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
        said = choose(many, [params] * draws, numbers.tolist())
        tail = float(probabilities(row, params).sort(descending=True)[0][count - 1 :].sum())
        assert said.count(None) <= math.ceil(3 * draws * tail)
        for number, token in list(zip(numbers.tolist(), said, strict=True))[:10]:
            assert token in (None, *choose(whole_row(row), [params], [number]))


def test_equal_logits_across_the_border_leave_a_token_open() -> None:
    """The k-th and those after the last candidate are equal: they stay, so all are needed."""
    row = torch.zeros(1000)
    row[0] = 1.0
    params = SamplingParams(temperature=1.0, top_k=5)
    assert choose(greatest(row[None], [params], 34), [params], [0.5]) == [None]
    row[100:] = -1.0
    assert choose(greatest(row[None], [params], 34), [params], [0.5]) == [None]
    assert choose(greatest(row[None], [params], 120), [params], [0.5]) != [None]


def test_on_a_border_nothing_is_said() -> None:
    """Sums of many weights and of few round differently; so near to a border one of them counts."""
    row, params = logits(0, 700), SamplingParams(temperature=1.0, top_k=7)
    found, border = greatest(row[None], [params], 38), border_numbers(row, params)[5]
    assert choose(whole_row(row), [params], [border]) != [None]
    assert choose(found, [params], [border]) == [None]
    assert choose(found, [params], [border + 1e-6]) != [None]


def test_masked_logits() -> None:
    """Tokens of probability 0, as of a padded vocabulary, are never drawn and need no whole row."""
    row = torch.full((2000,), -torch.inf)
    row[[5, 9]] = torch.tensor([1.0, 2.0])
    for params in (SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_p=0.999)):
        found = greatest(row[None], [params], 1024)
        assert [choose(found, [params], [number])[0] for number in (0.0, 0.5, LAST_NUMBER)] in (
            [9, 9, 5], [9, 9, None]
        )  # fmt: skip
        assert choose(whole_row(row), [params], [LAST_NUMBER]) == [5]
