"""Penalties on what a request has seen, held against transformers and a plain loop."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from qwen3_ascend import SamplingParams
from qwen3_ascend.runtime.engine.penalties import Penalties
from qwen3_ascend.runtime.engine.request import Request

VOCABULARY = 50

TOKENS = st.lists(st.integers(0, VOCABULARY - 1), max_size=8)


def logits(seed: int, rows: int = 1) -> Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def request(
    params: SamplingParams, prompt: list[int], output: list[int], number: int = 0
) -> Request:
    return Request(number, params, [*prompt, *output], len(prompt), 1000, frozenset())


def by_hand(row: Tensor, params: SamplingParams, prompt: list[int], output: list[int]) -> Tensor:
    """Transformers' penalty, then each token of the output once, and once for each time."""
    ids = torch.LongTensor([[*prompt, *output]])
    theirs = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)
    done: Tensor = theirs(ids, row[None].clone())[0]
    for token in set(output):
        done[token] -= params.presence_penalty + output.count(token) * params.frequency_penalty
    return done


@settings(max_examples=200)
@given(
    seed=st.integers(0, 1000),
    repetition=st.sampled_from([1.0, 0.5, 1.3, 5.0]),
    presence=st.sampled_from([0.0, -1.0, 1.5]),
    frequency=st.sampled_from([0.0, -0.5, 2.0]),
    sequences=st.lists(st.tuples(TOKENS.filter(bool), TOKENS), min_size=1, max_size=4),
)
def test_a_batch_grows_token_by_token(
    seed: int, repetition: float, presence: float, frequency: float,
    sequences: list[tuple[list[int], list[int]]],
) -> None:  # fmt: skip
    """Every second request has the penalties; each step shows one more token of the outputs."""
    params = [SamplingParams(), SamplingParams(
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency
    )]  # fmt: skip
    penalties, rows = Penalties(), logits(seed, len(sequences))
    before = rows.clone()
    for length in range(9):
        batch = [
            request(params[row % 2], prompt, output[:length], row)
            for row, (prompt, output) in enumerate(sequences)
        ]
        done = penalties(rows, batch)
        for row, (prompt, output) in enumerate(sequences):
            expected = by_hand(before[row], params[row % 2], prompt, output[:length])
            assert torch.equal(done[row], expected)
    assert torch.equal(rows, before), "the logits that were given have changed"


def test_presence_counts_each_output_token_once_and_no_prompt() -> None:
    row, params = logits(1), SamplingParams(presence_penalty=1.5)
    expected = row.clone()
    expected[0, [5, 7]] -= 1.5
    assert torch.equal(Penalties()(row, [request(params, [3, 4], [5, 5, 5, 7])]), expected)
    assert Penalties()(row, [request(params, [3, 4], [])]) is row


def test_frequency_counts_each_output_token_each_time_and_no_prompt() -> None:
    row, params = logits(1), SamplingParams(frequency_penalty=0.5)
    expected = row.clone()
    expected[0, 5] -= 1.5
    expected[0, 7] -= 0.5
    assert torch.equal(Penalties()(row, [request(params, [3, 4], [5, 5, 5, 7])]), expected)
    assert Penalties()(row, [request(params, [3, 4], [])]) is row


def test_a_prompt_token_counts_once_it_is_said_again() -> None:
    row, penalties = logits(2), Penalties()
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=1.0)
    for output in ([], [8], [8, 3]):
        done = penalties(row, [request(params, [3, 4], output)])
        assert torch.equal(done[0], by_hand(row[0], params, [3, 4], output))


def test_forgetting_starts_anew() -> None:
    row, penalties = logits(3), Penalties()
    params = SamplingParams(repetition_penalty=2.0)
    penalties(row, [request(params, [1, 2], [3])])
    penalties.forget(0)
    penalties.forget(0)  # an unknown one is nothing to complain of
    done = penalties(row, [request(params, [4], [5])])
    assert torch.equal(done[0], by_hand(row[0], params, [4], [5]))


def test_a_long_context_is_read_once() -> None:
    class Counted(list[int]):
        reads = 0

        def __getitem__(self, at: Any) -> Any:
            found = super().__getitem__(at)
            Counted.reads += len(found) if isinstance(at, slice) else 1
            return found

    one = request(SamplingParams(repetition_penalty=2.0), [1] * 1000, [])
    one.tokens = Counted(one.tokens)
    penalties, row = Penalties(), logits(4)
    for token in range(10):
        penalties(row, [one])
        one.tokens.append(token)
    assert Counted.reads == 1009
