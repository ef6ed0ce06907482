"""How long strategy `routed` takes on one large layer, and how much memory: its bar is 3 minutes and 6 GB on two cores.

    python tests/benchmarks/bench_routed.py

The layer is made up: tokens mix a few of many topics, and so do the rows of the gate, so that there is something for a
router to tell apart. Prints a Markdown report and writes it to docs/benchmarks/<date>-routed-<cpu>.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

import torch
from factorctl_plugins import routed
from reporting import header, report_path, timed, write_report

from factorctl.contracts import DenseFFN, LayerStats, Partition, PartitionSpec, TokenSample, validate
from factorctl.ffn.dense import cast_ffn, dense_hidden
from factorctl.memory import peak_memory

LIBRARIES = ("factorctl", "torch", "POT", "numpy")
BAR_SECONDS, BAR_BYTES = 180, 6e9
TOPICS = 256
STEPS = {
    "what neurons give": "neuron_masses",
    "clusters of gate rows to start from": "first_groups",
    "transport": "assign",
    "value of every neuron in every group": "values",
    "mass captured on the judging tokens": "captured_mass",
}


def main() -> int:
    arguments = parse(sys.argv[1:])
    torch.manual_seed(0)
    ffn, sample = layer_of(arguments.neurons, arguments.hidden_size, arguments.tokens)
    shared = arguments.neurons // 4
    spec = PartitionSpec(arguments.experts, layer=0, seed=0, top_k=arguments.experts // 4, shared_size=shared)
    spent: dict[str, list[float]] = {}
    for step, name in STEPS.items():
        setattr(routed, name, timed(getattr(routed, name), step, spent))
    routed.Router.fit = timed(routed.Router.fit, "router", spent)  # type: ignore[method-assign]
    started = time.perf_counter()
    found = routed.Routed().partition(ffn, LayerStats(tokens=arguments.tokens, sample=sample), spec)
    total, peak = time.perf_counter() - started, peak_memory()
    rounds, seconds = len(spent["transport"]), Counter({step: sum(times) for step, times in spent.items()})
    validate(found, num_neurons=arguments.neurons, num_experts=arguments.experts, shared_size=shared)
    captured = share_captured(ffn, sample, found, spec)
    write_report(report_path("routed"), render(arguments, seconds, rounds, total, peak, captured))
    return 0 if total < BAR_SECONDS and peak < BAR_BYTES else 1


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--neurons", type=int, default=14336, help="F, intermediate_size (default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=4096, help="D (default: %(default)s)")
    parser.add_argument("--experts", type=int, default=64, help="N (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=16384, help="T (default: %(default)s)")
    return parser.parse_args(words)


@torch.no_grad()
def layer_of(F: int, D: int, T: int) -> tuple[DenseFFN, TokenSample]:
    """A layer in bfloat16, and what it does on T tokens; its gate looks for the topics that tokens are made of."""
    topics_PD = torch.nn.functional.normalize(torch.randn(TOPICS, D), dim=1)
    x_TD = torch.nn.functional.normalize(mixed(T, topics_PD) + 0.5 * torch.randn(T, D) / D**0.5, dim=1) * D**0.5
    gate_FD = mixed(F, topics_PD) + 0.5 * torch.randn(F, D) / D**0.5
    up_FD, down_DF = torch.randn(F, D) / D**0.5, torch.randn(D, F) / F**0.5
    ffn, hidden_TF = DenseFFN(gate_FD, up_FD, down_DF), torch.empty(T, F)
    for x_CD, hidden_CF in zip(x_TD.split(2048), hidden_TF.split(2048), strict=True):
        hidden_CF.copy_(dense_hidden(ffn, "silu", x_CD))
    return cast_ffn(ffn, torch.bfloat16), TokenSample(x_TD, hidden_TF, torch.ones(T))


def mixed(count: int, topics_PD: torch.Tensor) -> torch.Tensor:
    """Rows of three topics each, some of which are far more frequent than others."""
    frequency_P = torch.rand(len(topics_PD)) ** 2
    picked = torch.multinomial(frequency_P.expand(count, -1), 3)
    return topics_PD[picked].mean(1)


def share_captured(ffn: DenseFFN, sample: TokenSample, found: Partition, spec: PartitionSpec) -> tuple[float, float]:
    """What the judging tokens keep of their mass: in the clusters that the search begins with, and in what it found."""
    masses = routed.neuron_masses(ffn, sample, 0)
    fitted, judging = masses.split()
    group_F = torch.zeros(ffn.intermediate_size, dtype=torch.int64)
    group_F[found.experts_NH] = torch.arange(1, spec.num_experts + 1)[:, None].expand_as(found.experts_NH)
    shares = []
    for groups_F in (routed.first_groups(ffn, masses.s_TF.sum(0), spec), group_F):
        router = routed.Router(fitted.x_TD)
        router.fit(fitted, groups_F, spec.num_experts)
        shares.append(routed.captured_mass(judging, router, groups_F, spec) / float(judging.s_TF.sum()))
    return shares[0], shares[1]


def render(
    arguments: argparse.Namespace,
    seconds: Counter[str],
    rounds: int,
    total: float,
    peak: int,
    captured: tuple[float, float],
) -> str:
    rows = "\n".join(f"| {step} | {taken:.1f} |" for step, taken in seconds.most_common())
    return f"""{header("One large layer by strategy `routed`", libraries=LIBRARIES)}
F = {arguments.neurons}, D = {arguments.hidden_size}, N = {arguments.experts}, a quarter shared, a quarter of the \
experts active, {arguments.tokens:,} tokens, {torch.get_num_threads()} torch threads:
{total:.0f} s for {rounds} rounds; the whole process, its tokens included, held {peak / 1e9:.1f} GB at the most. The \
bars are {BAR_SECONDS} s and {BAR_BYTES / 1e9:.0f} GB. Held-out tokens keep {captured[1]:.1%} of their
mass, {captured[0]:.1%} in the clusters of gate rows that the search begins with.

| step | seconds |
|---|---:|
{rows}
| the rest | {total - sum(seconds.values()):.1f} |
"""


if __name__ == "__main__":
    sys.exit(main())
