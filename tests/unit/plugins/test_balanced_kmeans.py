"""Balanced k-means against slow oracles: exact assignment, falling objective, degenerate points."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from factorctl_plugins import balanced_kmeans as module
from factorctl_plugins import transport
from factorctl_plugins.balanced_kmeans import assign_equally, balanced_kmeans, spread_centres, squared_distances
from scipy.optimize import linear_sum_assignment

from factorctl.contracts import InvalidPartitionError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spread(points_FC: torch.Tensor, clusters_NH: torch.Tensor) -> float:
    """The k-means objective in float64 by a plain loop: squared distances from each cluster's mean."""
    clusters = [points_FC[ids_H].double() for ids_H in clusters_NH]
    return sum(float(((members - members.mean(0)) ** 2).sum()) for members in clusters)


@pytest.mark.parametrize("num_clusters", [2, 6, 48])
@pytest.mark.parametrize("kind", ["gaussian", "ties", "one column far"])
def test_the_assignment_costs_as_little_as_the_exact_one(num_clusters: int, kind: str) -> None:
    """Against scipy's solver for square problems, with every column repeated once per place in it."""
    cost_FN = torch.randn(96, num_clusters, generator=seeded(), dtype=torch.float64)
    if kind == "ties":
        cost_FN = cost_FN.round()
    if kind == "one column far":
        cost_FN[:, 0] += 1e4
    clusters_NH = assign_equally(cost_FN)
    expanded_FF = cost_FN.repeat_interleave(96 // num_clusters, dim=1).numpy()
    best = expanded_FF[linear_sum_assignment(expanded_FF)].sum()
    cost = sum(float(cost_FN[ids_H, column].sum()) for column, ids_H in enumerate(clusters_NH))
    assert cost == pytest.approx(best, rel=1e-12)
    assert sorted(clusters_NH.flatten().tolist()) == list(range(96))


def test_more_rounds_never_spread_the_clusters_wider() -> None:
    points_FC = torch.randn(120, 6, generator=seeded())
    spreads = [
        spread(points_FC, balanced_kmeans(points_FC, 8, generator=seeded(), iterations=rounds))
        for rounds in range(1, 12)
    ]
    assert all(later <= earlier + 1e-4 for earlier, later in pairwise(spreads))
    assert spreads[-1] < 0.95 * spreads[0]


def test_it_stops_when_an_assignment_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = []
    solve = assign_equally
    monkeypatch.setattr(module, "assign_equally", lambda cost_FN: rounds.append(1) or solve(cost_FN))
    balanced_kmeans(torch.randn(40, 3, generator=seeded()), 4, generator=seeded(), iterations=1000)
    assert 2 <= len(rounds) < 50


def test_ids_rise_within_a_cluster() -> None:
    clusters_NH = balanced_kmeans(torch.randn(60, 4, generator=seeded()), 5, generator=seeded(), iterations=5)
    assert torch.equal(clusters_NH, clusters_NH.sort(dim=1).values)


def test_another_seed_may_find_another_optimum() -> None:
    points_FC = torch.randn(60, 4, generator=seeded())
    splits = {
        tuple(balanced_kmeans(points_FC, 6, generator=seeded(seed), iterations=3).flatten().tolist())
        for seed in range(4)
    }
    assert len(splits) > 1


@pytest.mark.parametrize("points_FC", [torch.zeros(12, 3), torch.ones(12, 3), torch.eye(2).repeat(6, 1)])
def test_copies_of_points_still_give_different_centres(points_FC: torch.Tensor) -> None:
    rows_FC = torch.cat([points_FC, torch.arange(12.0)[:, None] * 1e-30], dim=1)  # tells the copies apart
    centres_NC = spread_centres(rows_FC, rows_FC.square().sum(1), 12, seeded())
    assert sorted((centres_NC[:, -1] * 1e30).round().int().tolist()) == list(range(12))


def test_first_centres_lie_apart() -> None:
    """Three tight groups far from one another: k-means++ picks one centre from each."""
    points_FC = 100 * torch.eye(3).repeat(20, 1) + torch.randn(60, 3, generator=seeded())
    for seed in range(10):
        centres_NC = spread_centres(points_FC, points_FC.square().sum(1), 3, seeded(seed))
        assert sorted(centres_NC.argmax(1).tolist()) == [0, 1, 2]


def test_squared_distances_match_a_plain_loop() -> None:
    points_FC, centres_NC = torch.randn(30, 7, generator=seeded()), torch.randn(4, 7, generator=seeded(1))
    oracle_FN = [[float(((p - c).double() ** 2).sum()) for c in centres_NC] for p in points_FC]
    actual_FN = squared_distances(points_FC, points_FC.square().sum(1), centres_NC)
    np.testing.assert_allclose(actual_FN.numpy(), oracle_FN, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:numItermax")
def test_a_solver_that_stops_early_is_an_error_and_no_partition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "MAX_PIVOTS", 3)
    with pytest.raises(InvalidPartitionError, match="no exact assignment of 60 neurons to 5 groups: numItermax"):
        assign_equally(torch.randn(60, 5, generator=seeded()))
