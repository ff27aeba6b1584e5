"""Bits to a budget, held against every possible allocation."""

from __future__ import annotations

import itertools
import random

import pytest

from qwen3_ascend.convert.bits.allocation import Cost, allocate


def _every(costs: dict[str, list[Cost]], budget: int) -> float | None:
    """The least loss of all allocations that fit."""
    losses = [
        sum(cost.loss for cost in chosen)
        for chosen in itertools.product(*costs.values())
        if sum(cost.bits for cost in chosen) <= budget
    ]
    return min(losses, default=None)


@pytest.mark.parametrize("seed", range(200))
def test_no_allocation_loses_less_by_more_than_one_step(seed: int) -> None:
    rng = random.Random(seed)
    costs = {
        f"linear {number}": [
            Cost(rng.randint(1, 20), rng.uniform(0, 10)) for _ in range(rng.randint(1, 4))
        ]
        for number in range(rng.randint(1, 5))
    }
    budget = rng.randint(1, 80)
    found, best = allocate(costs, budget), _every(costs, budget)
    assert (found is None) == (best is None)
    if found is None or best is None:
        return
    assert sum(costs[linear][choice].bits for linear, choice in found.items()) <= budget
    loss = sum(costs[linear][choice].loss for linear, choice in found.items())
    largest_step = max(
        max(c.loss for c in each) - min(c.loss for c in each) for each in costs.values()
    )
    assert loss <= best + largest_step


def test_equal_linears_are_raised_where_it_pays_most() -> None:
    small, large = Cost(4, 9.0), Cost(8, 1.0)
    costs = {"a": [small, large], "b": [Cost(4, 3.0), Cost(8, 1.0)], "c": [small, large]}
    assert allocate(costs, 20) == {"a": 1, "b": 0, "c": 1}
    assert allocate(costs, 11) is None
    assert allocate(costs, 1000) == {"a": 1, "b": 1, "c": 1}


def test_more_bits_without_a_gain_are_never_taken() -> None:
    costs = {"a": [Cost(4, 1.0), Cost(8, 1.0), Cost(16, 2.0)]}
    assert allocate(costs, 100) == {"a": 0}


def test_a_choice_above_the_hull_is_passed_over() -> None:
    costs = {"a": [Cost(4, 10.0), Cost(5, 9.9), Cost(8, 1.0)]}
    assert allocate(costs, 8) == {"a": 2}
    assert allocate(costs, 6) == {"a": 0}
