"""Holds a candidate against the model it was made of, as `qwen3-ascend eval` does."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qwen3_ascend.evaluation.bootstrap import Values, interval
from qwen3_ascend.evaluation.measuring import measure
from qwen3_ascend.evaluation.result import Interval
from qwen3_ascend.evaluation.subject import Subject


@dataclass(frozen=True)
class Score:
    """A candidate against its reference.

    Attributes:
        divergence: KL(reference || candidate), nats a token.
        perplexity_change: the candidate's perplexity over the reference's, less one.
        perplexity: of the reference, on the same tokens.
    """

    divergence: Interval
    perplexity_change: Interval
    perplexity: float


def score(reference: Subject, candidate: Subject, windows: Sequence[Sequence[int]]) -> Score:
    """Reads all windows with both.

    Raises:
        CheckpointError: if the candidate's logits are not finite.
    """
    base, found = measure([reference, candidate], windows)
    assert found.kl is not None
    return Score(
        _estimate(found.kl.mean(1, dtype="float64")),
        _estimate(found.loss - base.loss, math.expm1),
        math.exp(base.loss.mean()),
    )


def _estimate(values: Values, scale: Callable[[float], float] = float) -> Interval:
    ends = interval(values)
    low, high = (None, None) if ends is None else (scale(ends[0]), scale(ends[1]))
    return Interval(scale(float(values.mean())), low, high)
