"""Intervals of paired means by the block bootstrap, with windows of text as blocks.

Tokens of one window depend on each other, so intervals that treat them as independent are too
narrow. Whole windows are drawn with replacement instead, the same for every figure; source: Efron
and Tibshirani, An Introduction to the Bootstrap, chapters 8 and 13 (the percentile interval).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
SEED = 0
LEVEL = 0.95

FEWEST_WINDOWS = 8
"""Below this there is no interval: resamples of a handful of blocks say nothing."""

DRAWS_AT_A_TIME = 1 << 20

Values = NDArray[np.float64]


def interval(values: Values) -> tuple[float, float] | None:
    """The 95 % percentile interval of the mean of one value for each window, float64 [W].

    Returns:
        (low, high), or None for fewer than FEWEST_WINDOWS windows.
    """
    windows = len(values)
    if windows < FEWEST_WINDOWS:
        return None
    generator = np.random.default_rng(SEED)
    means = np.empty(RESAMPLES)
    step = max(1, DRAWS_AT_A_TIME // windows)
    for start in range(0, RESAMPLES, step):
        count = min(step, RESAMPLES - start)
        drawn = generator.integers(0, windows, (count, windows))
        means[start : start + count] = values[drawn].mean(1)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    return float(low), float(high)
