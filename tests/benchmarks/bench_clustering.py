"""How long `clustered` takes on a large layer, and how near its assignment comes to the exact one.

    python tests/benchmarks/bench_clustering.py --threads 2

Prints a Markdown report and writes it to docs/benchmarks/<date>-clustering-<cpu>.md. The assignment is compared with
scipy's linear_sum_assignment, which solves the square problem with every expert repeated H times: affordable for
F = 1536, not for F = 14336.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from factorctl_plugins import balanced_kmeans
from factorctl_plugins.clustered import Clustered, gate_directions
from factorctl_plugins.seeding import layer_generator
from reporting import header, report_path, write_report
from scipy.optimize import linear_sum_assignment

from factorctl.contracts import DenseFFN, LayerStats, PartitionSpec, validate

LIBRARIES = ("factorctl", "torch", "POT", "numpy", "scipy")
BAR_SECONDS = 90
BAR_RATIO = 1.02


@dataclass(frozen=True)
class Timing:
    """One layer, split several times."""

    case: str
    seconds: list[float]
    """Wall time of each split."""
    cpu_seconds: list[float]
    """Processor time of each split, over all threads: what a busy machine does not inflate."""
    solver_seconds: list[float]
    """Wall time of each call of the transport solver in the last split: one for each k-means round."""


def main() -> int:
    arguments = parse(sys.argv[1:])
    load = os.getloadavg()[0]
    torch.set_num_threads(arguments.threads)
    balanced_kmeans.assign_equally(torch.zeros(4, 2))  # the first call imports POT: seconds that are paid once
    timings = [
        time_split(case, make, arguments) for case, make in cases(arguments.neurons, arguments.hidden_size).items()
    ]
    ratios = {num_experts: exact_ratio(num_experts) for num_experts in (8, 24, 64)}
    write_report(arguments.out, render(arguments, load, timings, ratios))
    met = all(max(timing.seconds) < BAR_SECONDS for timing in timings) and max(ratios.values()) <= BAR_RATIO
    return 0 if met else 1


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--neurons", type=int, default=14336, help="F, intermediate_size (default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=4096, help="D, and P for activations (default: %(default)s)")
    parser.add_argument("--experts", type=int, default=64, help="N (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="times that each layer is split (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=report_path("clustering"), help="default: %(default)s")
    return parser.parse_args(words)


def cases(F: int, D: int) -> dict[str, Callable[[], tuple[DenseFFN, LayerStats | None]]]:
    """Layers to split: without structure, with structure, and by activations with structure."""
    return {
        "by=weights, random bf16 gate": lambda: (ffn_of(random_rows(F, D)), None),
        "by=weights, bf16 gate around 100 directions of uneven weight": lambda: (ffn_of(grouped_rows(F, D)), None),
        f"by=activations, {D} tokens, 16 latent topics": lambda: (ffn_of(random_rows(F, 8)), topical_stats(F, D)),
    }


def random_rows(F: int, D: int) -> torch.Tensor:
    return torch.randn(F, D, generator=torch.Generator().manual_seed(0))


def grouped_rows(F: int, D: int) -> torch.Tensor:
    """Rows near one of 100 directions, some of which draw far more rows than an expert can hold."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(100, D, generator=generator)
    group_F = torch.multinomial(torch.rand(100, generator=generator) ** 2, F, replacement=True, generator=generator)
    return 0.5 * directions[group_F] + torch.randn(F, D, generator=generator)


def ffn_of(gate_FD: torch.Tensor) -> DenseFFN:
    """`clustered` reads no weight but the gate's: the two others are of width one."""
    F = len(gate_FD)
    return DenseFFN(gate_FD.bfloat16(), torch.zeros(F, 1), torch.zeros(1, F))


def topical_stats(F: int, P: int) -> LayerStats:
    """For each token the most active tenth of neurons that share latent topics, some of them busier than others."""
    generator = torch.Generator().manual_seed(2)
    score_PF = torch.randn(P, 16, generator=generator) @ torch.randn(16, F, generator=generator)
    score_PF += 2 * torch.randn(P, F, generator=generator) + 3 * torch.randn(F, generator=generator)
    threshold_P1 = score_PF.kthvalue(F - F // 10, dim=1, keepdim=True).values
    return LayerStats(tokens=P, patterns_PF=score_PF > threshold_P1)


def time_split(
    case: str, make: Callable[[], tuple[DenseFFN, LayerStats | None]], arguments: argparse.Namespace
) -> Timing:
    ffn, stats = make()
    by = "weights" if stats is None else "activations"
    spec = PartitionSpec(arguments.experts, layer=0, seed=0, options={"by": by})
    timing = Timing(case, [], [], [])
    for _ in range(arguments.repeats):
        timing.solver_seconds.clear()
        with solver_calls_timed_into(timing.solver_seconds):
            start, cpu_start = time.perf_counter(), time.process_time()
            partition = Clustered().partition(ffn, stats, spec)
            timing.seconds.append(time.perf_counter() - start)
            timing.cpu_seconds.append(time.process_time() - cpu_start)
        validate(partition, num_neurons=arguments.neurons, num_experts=arguments.experts)
    return timing


@contextmanager
def solver_calls_timed_into(seconds: list[float]) -> Iterator[None]:
    solve = balanced_kmeans.assign_equally

    def timed(cost_FN: torch.Tensor) -> torch.Tensor:
        start = time.perf_counter()
        clusters_NH = solve(cost_FN)
        seconds.append(time.perf_counter() - start)
        return clusters_NH

    balanced_kmeans.assign_equally = timed
    try:
        yield
    finally:
        balanced_kmeans.assign_equally = solve


def exact_ratio(num_experts: int, F: int = 1536, D: int = 576) -> float:
    """Cost of our assignment over the exact optimum, for the centres that k-means++ gives."""
    points_FD = gate_directions(ffn_of(grouped_rows(F, D)))
    squares_F = points_FD.square().sum(1)
    generator = layer_generator(PartitionSpec(num_experts, layer=0, seed=0))
    centres_ND = balanced_kmeans.spread_centres(points_FD, squares_F, num_experts, generator)
    cost_FN = balanced_kmeans.squared_distances(points_FD, squares_F, centres_ND).double()
    clusters_NH = balanced_kmeans.assign_equally(cost_FN)
    cost = sum(float(cost_FN[ids_H, expert].sum()) for expert, ids_H in enumerate(clusters_NH))
    square_FF = cost_FN.repeat_interleave(F // num_experts, dim=1).numpy()
    return cost / float(square_FF[linear_sum_assignment(square_FF)].sum())


def render(arguments: argparse.Namespace, load: float, timings: list[Timing], ratios: dict[int, float]) -> str:
    rows = "\n".join(
        f"| {timing.case} | {statistics.median(timing.seconds):.1f} | {max(timing.seconds):.1f} "
        f"| {statistics.median(timing.cpu_seconds):.1f} | {len(timing.solver_seconds)} "
        f"| {sum(timing.solver_seconds):.1f} |"
        for timing in timings
    )
    ratio_rows = "\n".join(f"| {num_experts} | {ratio:.9f} |" for num_experts, ratio in ratios.items())
    is_shared = load + arguments.threads > (os.cpu_count() or 1) + 1
    busy = ": other work shared the cores, wall times are upper bounds" if is_shared else ""
    return f"""{header("Balanced clustering", libraries=LIBRARIES)}
{arguments.threads} torch threads; load average {load:.1f} at the start{busy}.

## Time to split one layer

F = {arguments.neurons}, D = {arguments.hidden_size}, N = {arguments.experts}, `iterations` at its default; \
{arguments.repeats} run(s) each. The bar is {BAR_SECONDS} s.

| layer | median, s | worst, s | processor time, s | k-means rounds | of which assignment, s |
|---|---|---|---|---|---|
{rows}

## Cost of the assignment over the exact optimum

F = 1536, D = 576, k-means++ centres, against scipy's `linear_sum_assignment`. The bar is {BAR_RATIO}.

| N | ratio |
|---|---|
{ratio_rows}
"""


if __name__ == "__main__":
    sys.exit(main())
