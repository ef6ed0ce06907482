"""Medians, percentiles and the uncertainty of a ratio of medians."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

P99_SAMPLES = 1000
"""Fewer samples than this say nothing about the slowest hundredth."""
RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A median with its 95% bootstrap interval."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Spread:
    """Percentiles of latencies in milliseconds; `p99` is None below 1000 samples."""

    p50: float
    p90: float
    p99: float | None
    samples: int


def spread(samples_ms: Sequence[float]) -> Spread:
    p50, p90, p99 = np.percentile(np.asarray(samples_ms), [50, 90, 99])
    enough = len(samples_ms) >= P99_SAMPLES
    return Spread(float(p50), float(p90), float(p99) if enough else None, len(samples_ms))


def ratio_of_medians(numerator: Sequence[float], denominator: Sequence[float], *, seed: int) -> Interval:
    """median(numerator) / median(denominator) with the interval of 2000 bootstrap resamples.

    Samples i of both sides were taken in the same round, so rounds are resampled, not sides: what slowed the machine
    down in one round slowed both.
    """
    top, bottom = np.asarray(numerator, dtype=float), np.asarray(denominator, dtype=float)
    if top.shape != bottom.shape or not top.size:
        raise ValueError(f"need as many samples on both sides, got {top.size} and {bottom.size}")
    rows = np.random.default_rng(seed).integers(0, top.size, size=(RESAMPLES, top.size))
    ratios = np.median(top[rows], axis=1) / np.median(bottom[rows], axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Interval(float(np.median(top) / np.median(bottom)), float(low), float(high))
