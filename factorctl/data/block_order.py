"""In which order a trainer visits the blocks: a function of seed, epoch and place, with no state to save."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from factorctl.errors import UsageError


@dataclass(frozen=True)
class BlockOrder:
    """A fresh seeded permutation of the blocks for every epoch.

    A run that stopped after `n` blocks continues with `rows(n, count)` and sees what it would have seen unstopped.
    """

    seed: int
    num_blocks: int

    def __post_init__(self) -> None:
        if self.num_blocks < 1:
            raise UsageError("there are no blocks to put in order", "give more text")

    def rows(self, first: int, count: int) -> NDArray[np.int64]:
        """Block numbers of the visits first, first+1, ..., first+count-1 since the start of training, [count].

        Crosses from one epoch into the next where it must.
        """
        visits = range(first, first + count)
        return np.array([self.permutation(v // self.num_blocks)[v % self.num_blocks] for v in visits], dtype=np.int64)

    def epoch(self, visit: int) -> float:
        """Epochs done after `visit` blocks."""
        return visit / self.num_blocks

    def permutation(self, epoch: int) -> NDArray[np.int64]:
        """The order of the blocks in `epoch`, [num_blocks]."""
        return _permutation(self.seed, epoch, self.num_blocks)


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, num_blocks: int) -> NDArray[np.int64]:
    # Sorting raw bits: numpy promises the stream of a bit generator for good, not what `permutation` makes of it.
    keys = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(num_blocks)
    order = np.argsort(keys, kind="stable").astype(np.int64)
    order.setflags(write=False)
    return order
