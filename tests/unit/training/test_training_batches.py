"""Which sequences a step takes: sizes of a run, and the order of the blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from factorctl.errors import UsageError
from factorctl.training.batches import BlockOrder, plan_batches


def test_batches_fill_up_to_whole_steps() -> None:
    plan = plan_batches(1000, batch_tokens=100, block_length=16, micro_batch=None, world_size=1)
    assert (plan.batch_blocks, plan.batch_tokens, plan.steps) == (7, 112, 9)
    assert plan.tokens == 1008


def test_the_micro_batch_is_the_largest_that_divides_the_batch_and_fits() -> None:
    plan = plan_batches(10**6, batch_tokens=8192, block_length=1024, micro_batch=None, world_size=1)
    assert (plan.micro_batch, plan.rounds) == (4, 2)
    assert plan_batches(10**6, batch_tokens=8192, block_length=1024, micro_batch=3, world_size=1).rounds == 3


def test_one_process_with_two_rounds_takes_what_two_processes_take() -> None:
    one = plan_batches(1000, batch_tokens=64, block_length=16, micro_batch=2, world_size=1)
    two = plan_batches(1000, batch_tokens=64, block_length=16, micro_batch=2, world_size=2)
    assert (one.rounds, two.rounds, one.steps) == (2, 1, two.steps)
    alone = [one.first_visit(3, round_, 0) for round_ in range(2)]
    assert alone == [two.first_visit(3, 0, rank) for rank in range(2)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "--tokens 0 leaves nothing to train on"),
        ({"batch_tokens": 8}, "--batch-tokens 8 is less than one sequence of 16 tokens"),
        ({"micro_batch": 0}, "--micro-batch 0 is out of range"),
    ],
)
def test_bad_sizes_are_refused(options: dict[str, Any], message: str) -> None:
    sizes = {"tokens": 100, "batch_tokens": 32, "block_length": 16, "micro_batch": None, "world_size": 1} | options
    with pytest.raises(UsageError, match=message):
        plan_batches(sizes.pop("tokens"), **sizes)


def test_block_order() -> None:
    order = BlockOrder(seed=3, num_blocks=7)
    visited = order.rows(0, 21)
    for epoch in range(3):
        assert sorted(visited[7 * epoch : 7 * epoch + 7].tolist()) == list(range(7))
    assert visited[:7].tolist() != visited[7:14].tolist()
    resumed = BlockOrder(seed=3, num_blocks=7)
    assert np.concatenate([resumed.rows(5, 9), resumed.rows(14, 7)]).tolist() == visited[5:].tolist()
    assert BlockOrder(seed=4, num_blocks=7).rows(0, 21).tolist() != visited.tolist()
    assert order.epoch(14) == 2.0
    with pytest.raises(UsageError, match="there are no blocks"):
        BlockOrder(seed=0, num_blocks=0)


def test_block_order_is_fixed_for_good() -> None:
    """A run that is resumed under another numpy must see the same blocks."""
    assert BlockOrder(seed=0, num_blocks=10).rows(0, 10).tolist() == [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]
