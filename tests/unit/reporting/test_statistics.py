"""Intervals and percentiles against resampling by hand and against figures that can be worked out."""

from __future__ import annotations

import numpy as np
import pytest

from factorctl.reporting.statistics import ratio_interval, ratio_of_medians, spread


def test_the_interval_is_that_of_resampled_documents() -> None:
    draw = np.random.default_rng(3)
    tokens = draw.integers(10, 100, size=60).astype(float)
    sums = tokens * draw.normal(3.0, 0.4, size=60)
    interval = ratio_interval(list(sums), list(tokens), seed=0)
    assert interval is not None
    again = np.random.default_rng(1)
    ratios = []
    for _ in range(4000):
        drawn = again.integers(60, size=60)
        ratios.append(sums[drawn].sum() / tokens[drawn].sum())
    assert interval == pytest.approx(np.quantile(ratios, [0.025, 0.975]), abs=0.02)
    assert interval == ratio_interval(list(sums), list(tokens), seed=0)


def test_one_document_says_nothing_of_others() -> None:
    assert ratio_interval([3.0], [2.0], seed=0) is None


def test_p99_needs_a_thousand_samples() -> None:
    assert spread([1.0] * 999).p99 is None
    assert spread(list(range(1000))).p99 == pytest.approx(989.01)
    assert spread([1, 2, 3]).p50 == 2


def test_ratio_of_medians_and_its_interval() -> None:
    exact = ratio_of_medians([2.0] * 20, [1.0] * 20, seed=0)
    assert (exact.median, exact.low, exact.high) == (2, 2, 2)
    noisy = ratio_of_medians([2, 3, 2.5, 2.2, 2.8], [1, 1.1, 0.9, 1, 1.05], seed=0)
    assert noisy.low < noisy.median < noisy.high
    # Paired rounds: what doubles both sides leaves the ratio alone.
    paired = ratio_of_medians([2.0, 4.0, 8.0], [1.0, 2.0, 4.0], seed=0)
    assert (paired.low, paired.high) == (2, 2)
    with pytest.raises(ValueError, match="as many samples on both sides, got 2 and 1"):
        ratio_of_medians([1, 2], [1], seed=0)
