"""Blocks and turns: invariants under any order of events. No tensor is involved."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from qwen3_ascend import SamplingParams
from qwen3_ascend.runtime.backends.cache import SCRATCH_BLOCK
from qwen3_ascend.runtime.engine.blocks import BlockAllocator
from qwen3_ascend.runtime.engine.request import Request
from qwen3_ascend.runtime.engine.scheduler import Decode, Prefill, Scheduler


class Allocations(RuleBasedStateMachine):
    """A model that knows only who owns how much."""

    owners = Bundle("owners")

    @initialize(blocks=st.integers(1, 12), size=st.integers(1, 5))
    def start(self, blocks: int, size: int) -> None:
        self.allocator = BlockAllocator(blocks, size)
        self.owned: dict[int, list[int]] = {}
        self.count = 0

    @rule(target=owners, tokens=st.integers(1, 40))
    def reserve(self, tokens: int) -> object:
        needed = -(-tokens // self.allocator.block_size)
        fits = needed <= self.allocator.free_blocks
        assert self.allocator.can_reserve(tokens) == fits
        if not fits:
            with pytest.raises(AssertionError):
                self.allocator.reserve(-1, tokens)
            return multiple()
        self.count += 1
        blocks = self.allocator.reserve(self.count, tokens)
        assert len(blocks) == needed
        self.owned[self.count] = blocks
        return self.count

    @rule(owner=consumes(owners))
    def release(self, owner: int) -> None:
        self.allocator.release(owner)
        del self.owned[owner]

    @rule()
    def release_nothing(self) -> None:
        before = self.allocator.free_blocks
        self.allocator.release(-7)
        assert self.allocator.free_blocks == before

    @invariant()
    def every_block_has_one_place(self) -> None:
        if not hasattr(self, "allocator"):
            return
        self.allocator.check_integrity()
        blocks = [block for owned in self.owned.values() for block in owned]
        assert SCRATCH_BLOCK not in blocks
        assert len(set(blocks)) == len(blocks)
        assert len(blocks) + self.allocator.free_blocks == self.allocator.num_blocks - 1


class Turns(RuleBasedStateMachine):
    """Requests come, are computed, end and are abandoned in any order."""

    @initialize(
        blocks=st.integers(4, 20),
        size=st.integers(1, 4),
        max_batch=st.integers(1, 4),
        chunk=st.integers(1, 9),
    )
    def start(self, blocks: int, size: int, max_batch: int, chunk: int) -> None:
        self.allocator = BlockAllocator(blocks, size)
        self.scheduler = Scheduler(self.allocator, max_batch, chunk)
        self.alive: list[Request] = []
        self.started: list[int] = []
        self.count = 0

    @rule(prompt=st.integers(1, 12), new=st.integers(1, 6))
    def add(self, prompt: int, new: int) -> None:
        length = min(prompt + new, self.allocator.capacity)
        prompt = min(prompt, length - 1)
        if prompt < 1:
            return
        self.count += 1
        params = SamplingParams(max_new_tokens=new)
        request = Request(self.count, params, [0] * prompt, prompt, length, frozenset())
        self.scheduler.add(request)
        self.alive.append(request)

    @precondition(lambda self: self.scheduler.busy)
    @rule()
    def step(self) -> None:
        work = self.scheduler.next()
        if isinstance(work, Prefill):
            self.prefill(work)
            return
        assert isinstance(work, Decode)
        assert 0 < len(work.sequences) <= self.scheduler.max_batch
        for request in work.sequences:
            assert request.computed == len(request.tokens) - 1
            request.computed += 1
            self.give_token(request)

    def prefill(self, work: Prefill) -> None:
        request = work.sequence
        assert 0 < work.length <= self.scheduler.prefill_chunk
        if request.number not in self.started:
            self.started.append(request.number)
        request.computed += work.length
        assert request.computed <= len(request.tokens)
        if request.computed == len(request.tokens):
            self.scheduler.prefilled(request)
            self.give_token(request)

    def give_token(self, request: Request) -> None:
        request.append(1)
        assert len(request.tokens) <= request.max_length
        if request.finish_reason:
            self.scheduler.retire(request)
            self.alive.remove(request)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.alive))
        self.scheduler.retire(request)
        self.scheduler.retire(request)  # a second time does no harm
        self.alive.remove(request)

    @invariant()
    def nothing_is_lost(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        assert self.scheduler.busy == bool(self.alive)
        self.allocator.check_integrity()
        held = [block for request in self.alive for block in request.block_table]
        assert len(set(held)) == len(held)
        assert len(held) + self.allocator.free_blocks == self.allocator.num_blocks - 1
        assert self.started == sorted(self.started), "first come, first served"

    def teardown(self) -> None:
        """Whatever happened, the rest runs to its end: nobody starves."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(2000):
            if not self.scheduler.busy:
                break
            self.step()
        assert not self.alive
        assert self.allocator.free_blocks == self.allocator.num_blocks - 1


TestAllocations = Allocations.TestCase
TestAllocations.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestTurns = Turns.TestCase
TestTurns.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def request(number: int, prompt: int = 3, length: int = 10) -> Request:
    return Request(number, SamplingParams(), [0] * prompt, prompt, length, frozenset({9}))


def test_capacity_leaves_out_the_scratch_block() -> None:
    allocator = BlockAllocator(5, 16)
    assert allocator.capacity == 64
    assert [allocator.blocks_for(n) for n in (1, 16, 17, 64)] == [1, 1, 2, 4]
    assert SCRATCH_BLOCK not in allocator.reserve(1, 64)
    assert not allocator.can_reserve(1)


def test_a_lost_block_is_noticed() -> None:
    allocator = BlockAllocator(5, 16)
    allocator.reserve(1, 20)
    allocator._owned[1].pop()
    with pytest.raises(AssertionError):
        allocator.check_integrity()


def test_prompts_first_and_no_more_than_the_batch() -> None:
    scheduler = Scheduler(BlockAllocator(100, 4), max_batch=2, prefill_chunk=2)
    requests = [request(number) for number in range(3)]
    for one in requests:
        scheduler.add(one)
    for one in requests[:2]:
        for length in (2, 1):
            work = scheduler.next()
            assert isinstance(work, Prefill)
            assert (work.sequence, work.length) == (one, length)
            assert work.completes == (length == 1)
            one.computed += length
        scheduler.prefilled(one)
        one.append(1)
    work = scheduler.next()
    assert isinstance(work, Decode) and work.sequences == tuple(requests[:2])
    scheduler.retire(requests[0])
    work = scheduler.next()
    assert isinstance(work, Prefill) and work.sequence is requests[2]


@pytest.mark.parametrize("token", [9, 10])
def test_either_of_two_end_tokens_ends(token: int) -> None:
    one = Request(0, SamplingParams(), [1], 1, 10, frozenset({9, 10}))
    one.append(3)
    assert one.finish_reason is None
    one.append(token)
    assert one.finish_reason == "stop" and list(one.output) == [3, token]
    ignoring = Request(0, SamplingParams(ignore_eos=True), [1], 1, 3, frozenset({9, 10}))
    ignoring.append(token)
    assert ignoring.finish_reason is None
    ignoring.append(4)
    assert ignoring.finish_reason == "length"


def test_an_end_token_at_the_last_place_is_a_stop() -> None:
    one = Request(0, SamplingParams(), [1], 1, 2, frozenset({9}))
    one.append(9)
    assert one.finish_reason == "stop"
