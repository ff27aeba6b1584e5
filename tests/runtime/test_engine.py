"""The engine, with a model that shows every wrong block: what it says depends on nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.counting_model import VOCABULARY, CountingModel, answer, counting_engine, next_token
from torch import Tensor

from qwen3_ascend import SamplingParams
from qwen3_ascend.errors import RequestError
from qwen3_ascend.runtime.backends.base import Download
from qwen3_ascend.runtime.backends.step import StepInputs
from qwen3_ascend.runtime.engine.blocks import BlockPool
from qwen3_ascend.runtime.engine.engine import Engine, Event, LogitsEvent, TokenEvent
from qwen3_ascend.runtime.engine.request import Request

NOTHING: frozenset[int] = frozenset()


def asked(
    engine: Engine, prompt: Sequence[int], count: int, eos_ids: frozenset[int] = NOTHING
) -> Request:
    return engine.add(prompt, SamplingParams(max_new_tokens=count), eos_ids)


def step(engine: Engine) -> list[Event]:
    """One step, after which every block is accounted for."""
    events = engine.step()
    engine.scheduler.pool.check_integrity(engine.scheduler.requests)
    return events


def run(engine: Engine) -> None:
    for _ in range(5000):
        if not engine.busy:
            break
        step(engine)
    assert not engine.busy, "somebody starves"
    pool = engine.scheduler.pool
    assert pool.free_blocks == pool.num_blocks - 1


@dataclass(frozen=True)
class Arrival:
    """A request of a trace, when it comes and (perhaps) is given up, and who chooses its tokens."""

    prompt: tuple[int, ...]
    count: int
    at: int
    abort: int | None
    drawn: bool


PROMPTS = st.one_of(
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=30),
    # Beginnings that many have in common, cut anywhere.
    st.tuples(st.integers(1, 24), st.lists(st.integers(0, 2), max_size=4)).map(
        lambda pair: [*range(pair[0]), *pair[1]]
    ),
).map(tuple)

ARRIVALS = st.lists(
    st.builds(
        Arrival,
        prompt=PROMPTS,
        count=st.integers(1, 12),
        at=st.integers(0, 25),
        abort=st.none() | st.integers(0, 40),
        drawn=st.booleans(),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=250, deadline=None)
@given(
    arrivals=ARRIVALS,
    block_size=st.integers(1, 8),
    spare=st.integers(0, 12),
    max_batch=st.integers(1, 6),
    step_tokens=st.integers(1, 40),
    prefix_cache=st.booleans(),
    runs_ahead=st.booleans(),
)
def test_what_is_said_depends_on_the_prompt_alone(
    arrivals: list[Arrival], block_size: int, spare: int, max_batch: int, step_tokens: int,
    prefix_cache: bool, runs_ahead: bool,
) -> None:  # fmt: skip
    """Any order, any batch, any chunk; a cache that just holds the largest request, or more."""
    largest = max(len(one.prompt) + one.count for one in arrivals)
    engine, _ = counting_engine(
        -(-largest // block_size) + spare, block_size, max_batch=max_batch,
        step_tokens=step_tokens, prefix_cache=prefix_cache, runs_ahead=runs_ahead,
    )  # fmt: skip
    said: dict[int, list[int]] = {}
    open_requests: dict[int, Request] = {}
    given_up: set[int] = set()
    for now in range(5000):
        for index, one in enumerate(arrivals):
            if one.at == now:
                # Drawn by the host, from logits that leave no choice.
                params = SamplingParams(
                    max_new_tokens=one.count, temperature=1e-3 if one.drawn else 0
                )
                open_requests[index] = engine.add(one.prompt, params, NOTHING)
                said[open_requests[index].number] = []
            if one.abort == now and index in open_requests:
                engine.abort(open_requests[index])
                engine.abort(open_requests[index])  # a second time does no harm
                given_up.add(index)
        if engine.busy:
            for event in step(engine):
                assert isinstance(event, TokenEvent)
                said[event.request.number].append(event.token)
        elif now > 25:
            break
    run(engine)
    for index, one in enumerate(arrivals):
        expected = answer(one.prompt, one.count)
        found = said[open_requests[index].number]
        assert found == expected if index not in given_up else found == expected[: len(found)]


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(PROMPTS, min_size=2, max_size=6),
    step_tokens=st.integers(1, 20),
    block_size=st.integers(1, 8),
)
def test_answers_never_wait_for_prompts(
    prompts: list[tuple[int, ...]], step_tokens: int, block_size: int
) -> None:
    """Where blocks are plenty, whoever has begun to answer gets a token in every step."""
    engine, _ = counting_engine(1000, block_size, step_tokens=step_tokens)
    for prompt in prompts:
        asked(engine, prompt, 8)
    answering: set[int] = set()
    while engine.busy:
        tokens = [event for event in step(engine) if isinstance(event, TokenEvent)]
        assert answering <= {event.request.number for event in tokens}
        answering |= {event.request.number for event in tokens}
        answering -= {event.request.number for event in tokens if event.finish_reason}


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    engine, model = counting_engine(200, 4, step_tokens=16)
    long = asked(engine, [1] * 100, 4)
    step(engine)
    short = asked(engine, [2, 3], 1)
    before = model.rows
    assert [event.request for event in step(engine)] == [short]
    assert model.rows - before == 16 and long.computed == 30
    run(engine)


def test_a_long_prompt_is_read_beside_any_number_of_short_ones() -> None:
    """Each step brings more short prompts than it could hold; the long one gets its half."""
    engine, _ = counting_engine(500, 4, step_tokens=16)
    long = asked(engine, [1] * 100, 1)
    for _ in range(13):
        for start in range(4):
            asked(engine, [start, 3, 4, 5, 6], 1)
        step(engine)
    assert long.finish_reason == "length"
    run(engine)


def test_of_equal_prompts_the_first_comes_first() -> None:
    engine, _ = counting_engine(200, 4, step_tokens=16)
    first, second = asked(engine, [1] * 32, 1), asked(engine, [2] * 32, 1)
    said = [[event.request for event in step(engine)] for _ in range(4)]
    assert said == [[], [first], [], [second]]


def test_running_answers_go_on_while_a_long_prompt_is_computed() -> None:
    engine, _ = counting_engine(500, 4, step_tokens=16)
    answers = [asked(engine, [number, 1], 30) for number in range(8)]
    step(engine)
    asked(engine, [3] * 80, 1)
    for _ in range(10):
        got = {event.request.number for event in step(engine)}
        assert {one.number for one in answers} <= got


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_what_is_shared_is_computed_once(block_size: int) -> None:
    system = [*range(30)] * 2
    engine, model = counting_engine(400, block_size)
    asked(engine, [*system, 1], 2)
    run(engine)
    whole = model.rows
    request = asked(engine, [*system, 2, 3], 2)
    run(engine)
    shared = (len(system) // block_size) * block_size
    assert model.rows - whole == len(system) + 2 + 1 - shared
    assert list(request.output) == answer([*system, 2, 3], 2)
    same = asked(engine, [*system, 2, 3], 2)  # its last token is computed in any case
    run(engine)
    assert list(same.output) == list(request.output)
    without, plain = counting_engine(400, block_size, prefix_cache=False)
    for _ in range(2):
        asked(without, [*system, 1], 2)
        run(without)
    assert plain.rows == 2 * (len(system) + 2)


def test_prompts_that_come_together_share_too() -> None:
    """The others wait for the one that computes what they begin with; who shares nothing does not
    wait."""
    system = [*range(32)]
    engine, model = counting_engine(400, 4, step_tokens=16)
    requests = [asked(engine, [*system, number], 3) for number in range(6)]
    stranger = asked(engine, [5, 5, 5], 3)
    step(engine)
    step(engine)
    run(engine)
    assert model.rows == len(system) + 6 * (1 + 2) + 3 + 2
    for number, request in enumerate(requests):
        assert list(request.output) == answer([*system, number], 3)
    assert list(stranger.output) == answer([5, 5, 5], 3)


def test_the_block_that_was_unused_longest_goes_first() -> None:
    engine, model = counting_engine(6, 4)
    for start in (0, 8, 16):  # two full blocks each, and a third that is not full
        asked(engine, [*range(start, start + 9)], 1)
        run(engine)
    before = model.rows
    asked(engine, [*range(16, 25)], 1)
    run(engine)
    assert model.rows - before == 1  # of the last one everything is left
    before = model.rows
    asked(engine, [*range(9)], 1)
    run(engine)
    assert model.rows - before == 5  # of the first one its second block is gone


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_a_tiny_cache_says_the_same(prefix_cache: bool) -> None:
    prompts = [[number] * (3 + number) for number in range(6)]
    big, _ = counting_engine(400, 4)
    small, model = counting_engine(8, 4, prefix_cache=prefix_cache)
    said = []
    for engine in (big, small):
        requests = [asked(engine, prompt, 16) for prompt in prompts]
        run(engine)
        said.append([list(request.output) for request in requests])
    assert said[0] == said[1] == [answer(prompt, 16) for prompt in prompts]
    needed = sum(len(prompt) + 15 for prompt in prompts)
    assert prefix_cache or model.rows > needed, "nothing was put back: this proves nothing"


def test_the_oldest_is_never_put_back() -> None:
    engine, _ = counting_engine(6, 4, prefix_cache=False)
    first = asked(engine, [1, 2], 20)
    others = [asked(engine, [number, 7, 7], 18) for number in range(3)]
    tokens = 0
    while first.finish_reason is None:
        got = [event for event in step(engine) if event.request is first]
        assert len(got) == 1
        tokens += 1
    assert tokens == 20
    run(engine)
    assert all(list(one.output) == answer(one.tokens[:3], 18) for one in others)


def scored(engine: Engine, request: Request) -> list[Tensor]:
    """The rows of logits of a request that nothing else runs beside."""
    engine.queue(request)
    rows: list[Tensor] = []
    while engine.busy:
        rows += [event.rows for event in step(engine) if isinstance(event, LogitsEvent)]
    return rows


def test_scores_are_those_of_every_row() -> None:
    engine, model = counting_engine(60, 4, step_tokens=7)
    tokens = [*range(30)]
    asked(engine, tokens, 1)
    run(engine)  # the cache knows the prompt now, but not its logits
    before = model.rows
    rows = torch.cat(scored(engine, engine.scoring(tokens)))
    assert model.rows - before == len(tokens)
    assert rows.argmax(-1).tolist() == [next_token(tokens[: i + 1]) for i in range(len(tokens))]
    run(engine)


def test_scoring_beside_an_answer_loses_nothing_of_either() -> None:
    engine, _ = counting_engine(200, 4, step_tokens=5)
    request, scoring = asked(engine, [1, 2, 3], 12), engine.scoring([9] * 20)
    engine.queue(scoring)
    said, rows = [], 0
    while engine.busy:
        for event in step(engine):
            if isinstance(event, TokenEvent):
                assert event.request is request
                said.append(event.token)
            else:
                assert event.request is scoring
                rows += len(event.rows)
    assert said == answer([1, 2, 3], 12) == list(request.output)
    assert rows == 20 and scoring.finish_reason == "length"


def test_a_score_that_is_given_up_frees_its_blocks() -> None:
    engine, _ = counting_engine(60, 4, step_tokens=5)
    scoring = engine.scoring([9] * 20)
    engine.queue(scoring)
    step(engine)
    engine.abort(scoring)
    run(engine)


@pytest.mark.parametrize("token", [0, 1])
def test_either_of_two_end_tokens_ends(token: int) -> None:
    one = Request(0, SamplingParams(), [1], 1, 10, frozenset({0, 1}))
    one.append(3)
    reason = one.finish_reason
    assert reason is None
    one.append(token)
    assert one.finish_reason == "stop" and list(one.output) == [3, token]
    ignoring = Request(0, SamplingParams(ignore_eos=True), [1], 1, 3, frozenset({0, 1}))
    ignoring.append(token)
    assert ignoring.finish_reason is None
    ignoring.append(4)
    assert ignoring.finish_reason == "length"


def test_an_end_token_at_the_last_place_is_a_stop() -> None:
    one = Request(0, SamplingParams(), [1], 1, 2, frozenset({9}))
    one.append(9)
    assert one.finish_reason == "stop"


def test_what_can_never_fit_is_refused() -> None:
    engine, _ = counting_engine(4, 4)
    with pytest.raises(RequestError, match="room for 17 tokens.*holds 16"):
        asked(engine, [1] * 10, 7)
    asked(engine, [1] * 10, 6)
    run(engine)


def test_a_lost_block_is_noticed() -> None:
    pool = BlockPool(5, 16)
    request = Request(0, SamplingParams(), [1] * 20, 20, 30, frozenset())
    assert pool.grow(request, 20) and not pool.grow(request, 100)
    pool.check_integrity([request])
    request.block_table.pop()
    with pytest.raises(AssertionError):
        pool.check_integrity([request])


def watched(engine_blocks: int, **options: Any) -> tuple[Engine, CountingModel, list[str]]:
    """An engine that runs ahead, and what it does in which order."""
    engine, model = counting_engine(engine_blocks, 4, runs_ahead=True, **options)
    order: list[str] = []
    forward, issue = engine._forward, engine._download

    def computed(inputs: StepInputs) -> Tensor:
        order.append("issue")
        return forward(inputs)

    def downloaded(tensor: Tensor) -> Download:
        wait = issue(tensor)

        def read() -> Tensor:
            order.append("read")
            return wait()

        return read

    engine._forward, engine._download = computed, downloaded
    return engine, model, order


def test_a_step_is_issued_before_the_last_one_is_read() -> None:
    engine, model, order = watched(16)
    request = asked(engine, [1, 2, 3], 4)
    run(engine)
    assert list(request.output) == answer([1, 2, 3], 4)
    assert order == ["issue", "issue", "read", "issue", "read", "issue", "read", "read"]
    assert model.rows == 3 + 3  # that the fourth token is the last was known


def test_an_answer_that_ends_costs_one_row_in_vain() -> None:
    said = answer([1, 2, 3], 6)
    end = said[3]
    assert end not in said[:3]
    engine, model, _ = watched(16)
    request = asked(engine, [1, 2, 3], 6, frozenset({end}))
    run(engine)
    assert list(request.output) == said[:4] and request.finish_reason == "stop"
    assert model.rows == 3 + 3 + 1


def test_what_the_host_chooses_is_read_first() -> None:
    """A batch with one sampled request waits for it: all go on together."""
    engine, _, order = watched(16)
    asked(engine, [1, 2, 3], 3)
    sampled = engine.add([4, 5], SamplingParams(max_new_tokens=3, temperature=1, seed=1), NOTHING)
    run(engine)
    assert len(sampled.output) == 3
    assert order == ["issue"] * 3  # of two requests each, and no tokens chosen by the device
