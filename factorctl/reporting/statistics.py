"""How sure a mean over documents and a ratio of medians are, by the bootstrap; and percentiles of latencies.

M documents, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
LEVEL = 0.95
P99_SAMPLES = 1000
"""Fewer samples than this say nothing about the slowest hundredth."""
_ROWS = 256

Interval = tuple[float, float]
"""Lower and upper end, at `LEVEL`."""


@dataclass(frozen=True)
class Estimate:
    """A median with the ends of its interval, at `LEVEL`."""

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


def ratio_interval(sums_M: Sequence[float], counts_M: Sequence[float], *, seed: int) -> Interval | None:
    """Percentile interval of sum(sums) / sum(counts) over resampled documents; None for fewer than two documents.

    Tokens of a document are not independent of one another, so they are never resampled one by one: each resample draws
    as many documents as there are, with replacement, and keeps or drops each of them whole.

    The same seed and number of documents give the same resamples, whatever is averaged: intervals of two models and of
    their difference then rest on the same draws.
    """
    if len(sums_M) < 2:
        return None
    sums, counts = np.asarray(sums_M, float), np.asarray(counts_M, float)
    return _interval(_resampled_ratios(sums, counts, np.random.default_rng(seed)))


def ratio_of_medians(numerator: Sequence[float], denominator: Sequence[float], *, seed: int) -> Estimate:
    """median(numerator) / median(denominator) with its interval over resampled rounds.

    Samples i of both sides were taken in the same round, so rounds are resampled, not sides: what slowed the machine
    down in one round slowed both.
    """
    top, bottom = np.asarray(numerator, dtype=float), np.asarray(denominator, dtype=float)
    if top.shape != bottom.shape or not top.size:
        raise ValueError(f"need as many samples on both sides, got {top.size} and {bottom.size}")
    rows = np.random.default_rng(seed).integers(0, top.size, size=(RESAMPLES, top.size))
    low, high = _interval(np.median(top[rows], axis=1) / np.median(bottom[rows], axis=1))
    return Estimate(float(np.median(top) / np.median(bottom)), low, high)


def spread(samples_ms: Sequence[float]) -> Spread:
    p50, p90, p99 = np.percentile(np.asarray(samples_ms), [50, 90, 99])
    enough = len(samples_ms) >= P99_SAMPLES
    return Spread(float(p50), float(p90), float(p99) if enough else None, len(samples_ms))


def _resampled_ratios(
    sums_M: npt.NDArray[np.float64], counts_M: npt.NDArray[np.float64], generator: np.random.Generator
) -> npt.NDArray[np.float64]:
    """[R], a few rows at a time, so that [R, M] is never whole in memory."""
    documents = len(sums_M)
    ratios = []
    for start in range(0, RESAMPLES, _ROWS):
        rows = min(_ROWS, RESAMPLES - start)
        drawn_RM = generator.integers(documents, size=(rows, documents))
        ratios.append(sums_M[drawn_RM].sum(1) / counts_M[drawn_RM].sum(1))
    return np.concatenate(ratios)


def _interval(resampled_R: npt.NDArray[np.float64]) -> Interval:
    low, high = np.quantile(resampled_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
