"""Bits to a budget: which of its choices each linear gets, so that the least is lost.

The losses of single linears add up nearly (51 for the sum, 44 for all together, in thousandths of
a nat, where all linears of a small model became int4), so that the sum is what is made small. That
is the knapsack problem with several choices of each item; walking along the convex hulls of the
choices, the steepest piece first, is optimal but for the last piece (Kellerer, Pferschy and
Pisinger, Knapsack Problems, 2004, chapter 11).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """What a choice costs a linear.

    Attributes:
        bits: that are stored, in all.
        loss: what the model loses if this linear alone gets it, in nats a token.
    """

    bits: int
    loss: float


@dataclass(frozen=True)
class _Step:
    """From one choice of a linear to the next one on the hull."""

    linear: str
    choice: int
    bits: int
    gain: float

    @property
    def gain_per_bit(self) -> float:
        return self.gain / self.bits


def allocate(costs: Mapping[str, Sequence[Cost]], budget: int) -> dict[str, int] | None:
    """The choice of each linear, by its number.

    Args:
        costs: the choices of each linear.
        budget: bits that all of them may take.

    Returns:
        None if not even the smallest choices fit.
    """
    hulls = {linear: _hull(choices) for linear, choices in costs.items()}
    found = {linear: hull[0] for linear, hull in hulls.items()}
    left = budget - sum(costs[linear][choice].bits for linear, choice in found.items())
    if left < 0:
        return None
    ended: set[str] = set()
    for step in sorted(_steps(costs, hulls), key=lambda step: step.gain_per_bit, reverse=True):
        if step.linear in ended:
            continue
        if step.bits > left:
            ended.add(step.linear)  # what lies beyond is no cheaper
            continue
        left -= step.bits
        found[step.linear] = step.choice
    return found


def _steps(costs: Mapping[str, Sequence[Cost]], hulls: Mapping[str, list[int]]) -> list[_Step]:
    """All pieces of the hulls. The gain a bit falls along a hull: sorting keeps its order."""
    steps = []
    for linear, hull in hulls.items():
        for before, after in zip(hull, hull[1:], strict=False):
            one, other = costs[linear][before], costs[linear][after]
            steps.append(_Step(linear, after, other.bits - one.bits, one.loss - other.loss))
    return steps


def _hull(choices: Sequence[Cost]) -> list[int]:
    """The choices on the lower convex hull, from the fewest bits on: of those with as many bits the
    one with the least loss, and none that costs more bits without a gain."""
    order = sorted(range(len(choices)), key=lambda i: (choices[i].bits, choices[i].loss))
    hull: list[int] = []
    for index in order:
        here = choices[index]
        if hull and here.loss >= choices[hull[-1]].loss:
            continue
        while len(hull) > 1 and _slope(choices, hull[-1], index) >= _slope(
            choices, hull[-2], hull[-1]
        ):
            hull.pop()
        hull.append(index)
    return hull


def _slope(choices: Sequence[Cost], before: int, after: int) -> float:
    """Gain a bit between two choices."""
    one, other = choices[before], choices[after]
    return (one.loss - other.loss) / (other.bits - one.bits)
