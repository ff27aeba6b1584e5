"""Intervals against scipy's bootstrap, and against a case that can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap

from qwen3_ascend.evaluation.bootstrap import FEWEST_WINDOWS, RESAMPLES, interval


@pytest.mark.parametrize("windows", [FEWEST_WINDOWS, 40, 1000])
def test_it_is_the_percentile_interval_of_scipy(windows: int) -> None:
    values = np.random.default_rng(7).gamma(2.0, 0.01, windows)
    expected = bootstrap(
        (values,), np.mean, n_resamples=20 * RESAMPLES, method="percentile", rng=1
    ).confidence_interval
    found = interval(values)
    assert found is not None
    # Ends of 2,000 resamples stray by a few hundredths of the interval's width.
    width = expected.high - expected.low
    assert found == pytest.approx((expected.low, expected.high), abs=0.06 * width)


def test_ends_of_a_mean_of_coins() -> None:
    """The mean of 100 draws of 0 and 1 alike is 0.5, give or take 1.96 standard deviations of
    0.05."""
    found = interval(np.tile([0.0, 1.0], 50))
    assert found == pytest.approx((0.40, 0.60), abs=0.011)


def test_equal_windows_leave_no_doubt() -> None:
    assert interval(np.full(9, 0.25)) == (0.25, 0.25)


def test_the_same_figures_every_time() -> None:
    values = np.arange(20.0)
    assert interval(values) == interval(values)


def test_few_windows_have_none() -> None:
    assert interval(np.arange(FEWEST_WINDOWS - 1.0)) is None
