"""k-means whose clusters are all of one size.

Lloyd's algorithm alternates two steps, each the best answer to the other: every cluster's centre moves to the mean
of its points; every point joins a cluster. Without a limit the second step is "the nearest centre". With N clusters
of exactly H points it is balanced transport, solved exactly (`transport`), so the objective never rises from one round
to the next.

Symbols: F points, N clusters, H = F/N points of a cluster, C channels of a point.
"""

from __future__ import annotations

import torch

from .transport import assign, members


def balanced_kmeans(
    points_FC: torch.Tensor, num_clusters: int, *, generator: torch.Generator, iterations: int
) -> torch.Tensor:
    """Group the rows of `points_FC` into equal clusters of small spread.

    Args:
        points_FC: float32 features, F a multiple of `num_clusters`.
        generator: CPU generator that picks the first centres; all else is deterministic.
        iterations: rounds at most; fewer when an assignment repeats, which is a local optimum.

    Returns:
        Row ids, [N, H] int64 on the CPU, rising within each cluster.
    """
    squares_F = points_FC.square().sum(1)
    centres_NC = spread_centres(points_FC, squares_F, num_clusters, generator)
    clusters_NH = assign_equally(squared_distances(points_FC, squares_F, centres_NC))
    for _ in range(iterations - 1):
        previous_NH = clusters_NH
        centres_NC = cluster_means(points_FC, previous_NH)
        clusters_NH = assign_equally(squared_distances(points_FC, squares_F, centres_NC))
        if torch.equal(clusters_NH, previous_NH):
            break
    return clusters_NH


def spread_centres(
    points_FC: torch.Tensor, squares_F: torch.Tensor, num_centres: int, generator: torch.Generator
) -> torch.Tensor:
    """k-means++ (Arthur and Vassilvitskii, 2007): each next centre is drawn in proportion to its squared distance
    from the nearest one so far. Returns N different points, [N, C]."""
    chosen = [int(torch.randint(len(points_FC), (1,), generator=generator))]
    nearest_F = torch.full_like(squares_F, torch.inf)
    while len(chosen) < num_centres:
        newest_1C = points_FC[chosen[-1:]]
        nearest_F = torch.minimum(nearest_F, squared_distances(points_FC, squares_F, newest_1C)[:, 0])
        chosen.append(_draw(nearest_F, chosen, generator))
    return points_FC[chosen]


def _draw(weight_F: torch.Tensor, taken: list[int], generator: torch.Generator) -> int:
    """An index not yet taken, with odds `weight_F`; with equal odds when only copies of the taken points are left."""
    odds_F = weight_F.cpu().clone()
    odds_F[taken] = 0
    if not odds_F.any():
        odds_F.fill_(1)
        odds_F[taken] = 0
    return int(torch.multinomial(odds_F, 1, generator=generator))


def squared_distances(points_FC: torch.Tensor, squares_F: torch.Tensor, centres_NC: torch.Tensor) -> torch.Tensor:
    """||x||^2 - 2<x,c> + ||c||^2 as one matrix product, [F, N]; rounding below zero is clipped.

    Args:
        squares_F: ||x||^2 of the points, computed once because it costs as much as a product with one centre.
    """
    cross_FN = points_FC @ centres_NC.T
    return (squares_F[:, None] - 2 * cross_FN + centres_NC.square().sum(1)).clamp_min(0)


def cluster_means(points_FC: torch.Tensor, clusters_NH: torch.Tensor) -> torch.Tensor:
    """The mean of each cluster's points, [N, C]; one cluster at a time, so that the points are never copied whole."""
    return torch.stack([points_FC[ids_H].mean(0) for ids_H in clusters_NH])


def assign_equally(cost_FN: torch.Tensor) -> torch.Tensor:
    """Give every row one column and every column F/N rows, at the least total cost.

    Returns:
        Row ids, [N, H] int64 on the CPU, rising within each column.

    Raises:
        InvalidPartitionError: when the solver stops short of the optimum.
    """
    num_rows, num_columns = cost_FN.shape
    return members(assign(cost_FN, [num_rows // num_columns] * num_columns), num_columns)
