"""How sure a mean over documents is: the bootstrap, with documents as the unit.

Tokens of a document are not independent of one another, so they are never resampled one by one: each resample draws
as many documents as there are, with replacement, and keeps or drops each of them whole.

M documents, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
LEVEL = 0.95
_ROWS = 256

Interval = tuple[float, float]
"""Lower and upper end, at `LEVEL`."""


def ratio_interval(sums_M: Sequence[float], counts_M: Sequence[float], *, seed: int) -> Interval | None:
    """Percentile interval of sum(sums) / sum(counts) over resampled documents; None for fewer than two documents.

    The same seed and number of documents give the same resamples, whatever is averaged: intervals of two models and of
    their difference then rest on the same draws.
    """
    if len(sums_M) < 2:
        return None
    ratios_R = _resampled_ratios(np.asarray(sums_M, float), np.asarray(counts_M, float), np.random.default_rng(seed))
    low, high = np.quantile(ratios_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


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
