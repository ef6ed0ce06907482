"""Which sequences each step and process takes: a function of seed and step, so that a resumed run needs no state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from factorctl.data.blocks import Side, TokenBlocks
from factorctl.errors import UsageError

MICRO_TOKENS = {"cpu": 4096, "cuda": 16_384}
"""The most tokens that one process takes through the model at once, unless told otherwise."""


@dataclass(frozen=True)
class BatchPlan:
    """How a step's sequences fall into micro-batches and over processes."""

    block_length: int
    micro_batch: int
    """Sequences that one process takes at once."""
    rounds: int
    """Micro-batches of each process in a step."""
    world_size: int
    steps: int

    @property
    def batch_blocks(self) -> int:
        return self.micro_batch * self.rounds * self.world_size

    @property
    def batch_tokens(self) -> int:
        """Tokens of one optimiser step."""
        return self.batch_blocks * self.block_length

    @property
    def tokens(self) -> int:
        """Tokens of the whole run: the budget, filled up to whole steps."""
        return self.steps * self.batch_tokens

    def first_visit(self, step: int, round_: int, rank: int) -> int:
        """Place in the order of all blocks at which a micro-batch begins. Steps count from 0.

        A step's micro-batches are numbered over processes first, so that one process with two rounds takes the
        same ones as two processes with one.
        """
        return step * self.batch_blocks + (round_ * self.world_size + rank) * self.micro_batch


def plan_batches(
    tokens: int,
    *,
    batch_tokens: int,
    block_length: int,
    micro_batch: int | None,
    world_size: int,
    device_type: str = "cpu",
) -> BatchPlan:
    """Sizes of a run over `tokens` tokens; the batch is filled up to whole micro-batches on every process.

    Raises:
        UsageError: a size out of range, or a batch smaller than one sequence.
    """
    if tokens < 1:
        raise UsageError(f"--tokens {tokens} leaves nothing to train on", "give a number of tokens, for example 40M")
    if batch_tokens < block_length:
        raise UsageError(
            f"--batch-tokens {batch_tokens} is less than one sequence of {block_length} tokens",
            f"choose --batch-tokens {block_length} or more, or a shorter --block-length",
        )
    if micro_batch is not None and micro_batch < 1:
        raise UsageError(f"--micro-batch {micro_batch} is out of range", "choose 1 or more sequences")
    per_process = math.ceil(batch_tokens / block_length / world_size)
    if micro_batch is None:
        limit = max(1, MICRO_TOKENS.get(device_type, MICRO_TOKENS["cpu"]) // block_length)
        micro_batch = max(size for size in range(1, min(limit, per_process) + 1) if per_process % size == 0)
    rounds = math.ceil(per_process / micro_batch)
    step_tokens = micro_batch * rounds * world_size * block_length
    return BatchPlan(block_length, micro_batch, rounds, world_size, math.ceil(tokens / step_tokens))


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


@dataclass(frozen=True)
class Batches:
    """The sequences of one process."""

    blocks: TokenBlocks
    plan: BatchPlan
    seed: int
    rank: int
    device: torch.device

    @property
    def order(self) -> BlockOrder:
        return BlockOrder(self.seed, len(self.blocks.train))

    def of_step(self, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(input_ids, position_ids), each [micro_batch, block_length], for every round of a step."""
        firsts = (self.plan.first_visit(step, round_, self.rank) for round_ in range(self.plan.rounds))
        return [self.take("train", self.order.rows(first, self.plan.micro_batch)) for first in firsts]

    def heldout(self) -> list[tuple[tuple[torch.Tensor, torch.Tensor], bool]]:
        """This process's share of the held-out text, and whether it counts: all processes get equally many."""
        size, count = self.plan.micro_batch, len(self.blocks.heldout)
        starts = range(0, count, size)
        mine = []
        for turn in range(math.ceil(len(starts) / self.plan.world_size)):
            index = turn * self.plan.world_size + self.rank
            first = starts[index] if index < len(starts) else 0
            rows = np.arange(first, min(first + size, count))
            mine.append((self.take("heldout", rows), index < len(starts)))
        return mine

    def take(self, part: Side, rows: NDArray[np.integer[Any]]) -> tuple[torch.Tensor, torch.Tensor]:
        array = self.blocks.train if part == "train" else self.blocks.heldout
        ids = torch.from_numpy(array[rows].astype(np.int64))
        positions = torch.from_numpy(self.blocks.position_ids(part, rows))
        return ids.to(self.device), positions.to(self.device)

    def epochs(self) -> float:
        """How often the run sees its training text."""
        return self.plan.tokens / self.blocks.tokens
