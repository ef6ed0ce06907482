"""Neurons and router found together: experts that a linear router can tell apart, and shared neurons to match.

An expert is worth what its neurons give on the tokens that choose it, and who chooses is decided by a linear router.
Clustering alone groups what fires together and leaves the router to find out when; much of it cannot be read off x.
Here the router that will run takes part in every round.

With the token weight c_t, the size of what neuron f adds for token t is s_tf = c_t (h_tf ||w_down,f||)^2. Starting
from clusters of gate rows, with the neurons of the largest sum_t s_tf shared, a round is

    m_te = sum of s_tf over the neurons of expert e      what each expert gives each token
    W    = ridge regression of m, standardised, on x     the router that would be fitted
    C_t  = the K experts with the largest W x_t          its choice
    B_fe = sum of s_tf over the tokens that chose e      what f would give there; for the shared group, over all tokens
    reassign every neuron, shared ones included, to maximise the sum of B: balanced transport

so that the captured share of sum_tf s_tf rises: the reassignment is exact for a given choice. With the choice of an
oracle in place of the router's most of the gain is lost. An eighth of the tokens judges the rounds and never enters
them; the best round is kept.

Symbols: T tokens, D width, F neurons, N experts, K active, H neurons of an expert, S shared; S + N*H = F. Group 0 holds
the shared neurons, group e + 1 those of expert e.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from factorctl.contracts import DenseFFN, LayerStats, Partition, PartitionSpec, Stat, TokenSample, UsageError

from .balanced_kmeans import balanced_kmeans
from .clustered import gate_directions
from .options import whole_number
from .seeding import layer_generator
from .transport import assign, members, regrets

MAX_ROUNDS = 1000
CLUSTER_ROUNDS = 5
HELDOUT_SHARE = 1 / 8
MOVED_SHARE = 0.01
"""Rounds end when fewer neurons than this share change their group."""
MASS_CAP = 4.0
"""A token's mass sum_f s_tf counts for at most so many times the median token's. A few tokens with massive activations
would otherwise decide a layer alone."""
ROUTER_DAMPING = 1e-3
"""Of the ridge regression, relative to the mean square of x."""


@dataclass(frozen=True)
class Masses:
    """What the neurons give for the calibration tokens."""

    x_TD: torch.Tensor
    s_TF: torch.Tensor

    def split(self) -> tuple[Masses, Masses]:
        """The tokens that are fitted, and those that judge."""
        first = len(self.x_TD) - int(len(self.x_TD) * HELDOUT_SHARE)
        (x_fit, x_judge), (s_fit, s_judge) = (
            column.split([first, len(column) - first]) for column in (self.x_TD, self.s_TF)
        )
        return Masses(x_fit, s_fit), Masses(x_judge, s_judge)


class Routed:
    """Experts found together with the router that chooses them; chooses the shared neurons, too.

    Options:
        rounds: at most, default 8; 0 leaves the clusters of gate rows.
    """

    name = "routed"
    reference = "docs/design.md of factorctl; begins as MoEfication, https://arxiv.org/abs/2110.01786"
    option_names = frozenset({"rounds"})
    chooses_shared = True

    def needs(self, options: Mapping[str, str]) -> frozenset[Stat]:
        _rounds(options)
        return frozenset({Stat.TOKENS})

    def partition(self, ffn: DenseFFN, stats: LayerStats | None, spec: PartitionSpec) -> Partition:
        masses = neuron_masses(ffn, sample_of(stats), spec.layer)
        fitted, judging = masses.split()
        group_F = first_groups(ffn, masses.s_TF.sum(0).cpu(), spec)
        if len(judging.x_TD):
            group_F = best_round(group_F, fitted, judging, spec, rounds=_rounds(spec.options))
        routed_R, shared_S = torch.nonzero(group_F > 0).flatten(), torch.nonzero(group_F == 0).flatten()
        experts_NH = routed_R[members(group_F[routed_R], spec.num_experts)]
        return Partition(experts_NH, shared_S if spec.shared_size else None)


def sample_of(stats: LayerStats | None) -> TokenSample:
    """Raises:
    UsageError: when calibration kept no tokens.
    """
    if stats is None or stats.sample is None or not len(stats.sample.x_TD):
        raise UsageError(
            "strategy 'routed' needs calibration tokens, and none were kept",
            "use --strategy clustered, which needs no calibration",
        )
    return stats.sample


def neuron_masses(ffn: DenseFFN, sample: TokenSample, layer: int) -> Masses:
    """s_TF, every token's cut so that they sum to at most `MASS_CAP` times the median token's.

    Raises:
        UsageError: the layer gives values that are not finite.
    """
    norm_F = ffn.down_DF.float().square().sum(0).to(sample.x_TD.device)
    s_TF = sample.hidden_TF.square().mul_(norm_F).mul_(sample.weight_T[:, None])
    mass_T = s_TF.sum(1)
    if not mass_T.isfinite().all():
        raise UsageError(
            f"layer {layer} gives values that are not finite, so its neurons cannot be grouped",
            "check the source checkpoint, or use --strategy permuted",
        )
    s_TF.mul_((MASS_CAP * mass_T.median() / mass_T.clamp_min(1e-30)).clamp_max(1.0)[:, None])
    return Masses(sample.x_TD, s_TF)


def first_groups(ffn: DenseFFN, mass_F: torch.Tensor, spec: PartitionSpec) -> torch.Tensor:
    """The S neurons of the largest mass shared, the others in clusters of gate rows; [F] groups."""
    others_R = mass_F.argsort(descending=True, stable=True)[spec.shared_size :].sort().values
    clusters_NH = balanced_kmeans(
        gate_directions(ffn.select(others_R)),
        spec.num_experts,
        generator=layer_generator(spec),
        iterations=CLUSTER_ROUNDS,
    )
    group_F = torch.zeros(ffn.intermediate_size, dtype=torch.int64)
    group_F[others_R[clusters_NH]] = torch.arange(1, spec.num_experts + 1)[:, None].expand_as(clusters_NH)
    return group_F


def best_round(
    group_F: torch.Tensor, fitted: Masses, judging: Masses, spec: PartitionSpec, *, rounds: int
) -> torch.Tensor:
    """The groups of the round that captures most of the judging tokens' mass, the first one's included."""
    router = Router(fitted.x_TD)
    sizes = [spec.shared_size, *[(len(group_F) - spec.shared_size) // spec.num_experts] * spec.num_experts]
    best_F, best_mass = group_F, -1.0
    for turn in range(rounds + 1):
        router.fit(fitted, group_F, spec.num_experts)
        captured = captured_mass(judging, router, group_F, spec)
        if captured <= best_mass:
            break
        best_F, best_mass = group_F, captured
        if turn < rounds:
            value_FG = values(fitted, router, spec)
            first = 0 if spec.shared_size else 1
            moved_F = first + assign(regrets(value_FG[:, first:]), sizes[first:])
            if (moved_F != group_F).float().mean() < MOVED_SHARE:
                break
            group_F = moved_F
    return best_F


class Router:
    """The linear router of a round: ridge regression of what each expert gives a token on x."""

    def __init__(self, x_TD: torch.Tensor) -> None:
        gram_DD = (x_TD.T @ x_TD).double()
        gram_DD.diagonal().add_(ROUTER_DAMPING * gram_DD.diagonal().mean().clamp_min(1e-30))
        self._cholesky_DD = torch.linalg.cholesky(gram_DD)
        self.weight_DN = x_TD.new_zeros(x_TD.shape[1], 0)

    def fit(self, masses: Masses, group_F: torch.Tensor, num_experts: int) -> None:
        """Every token counts alike: its masses are taken at mean 0 and deviation 1, as calibration takes benefits."""
        mass_TN = masses.s_TF @ membership(group_F, num_experts)[:, 1:].to(masses.s_TF)
        mass_TN = mass_TN - mass_TN.mean(dim=1, keepdim=True)
        mass_TN = mass_TN / mass_TN.square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-20)
        cross_DN = masses.x_TD.T @ mass_TN
        self.weight_DN = torch.cholesky_solve(cross_DN.double(), self._cholesky_DD).float()

    def choose(self, x_TD: torch.Tensor, top_k: int) -> torch.Tensor:
        """Ones where a token chooses an expert, float32 [T, N]."""
        logits_TN = x_TD @ self.weight_DN
        return torch.zeros_like(logits_TN).scatter_(1, logits_TN.topk(top_k, dim=1).indices, 1.0)


def membership(group_F: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Ones where a neuron belongs to a group, float32 [F, 1 + N]."""
    return torch.nn.functional.one_hot(group_F, num_experts + 1).float()


def values(masses: Masses, router: Router, spec: PartitionSpec) -> torch.Tensor:
    """B_FG: the mass that each neuron would give in each group, the shared one first."""
    chosen_TN = router.choose(masses.x_TD, active_experts(spec))
    return torch.cat([masses.s_TF.sum(0)[:, None], masses.s_TF.T @ chosen_TN], dim=1).cpu()


def captured_mass(masses: Masses, router: Router, group_F: torch.Tensor, spec: PartitionSpec) -> float:
    """The mass of the neurons that run, summed over the tokens."""
    chosen_TN = router.choose(masses.x_TD, active_experts(spec))
    given_TG = masses.s_TF @ membership(group_F, spec.num_experts).to(masses.s_TF)
    return float(given_TG[:, 0].sum() + (given_TG[:, 1:] * chosen_TN).sum())


def active_experts(spec: PartitionSpec) -> int:
    """K; half of the experts where that is not known, or where K leaves nothing to choose."""
    k = spec.top_k
    return k if k is not None and 0 < k < spec.num_experts else max(1, spec.num_experts // 2)


def _rounds(options: Mapping[str, str]) -> int:
    return whole_number("routed", "rounds", options.get("rounds", "8"), low=0, high=MAX_ROUNDS)
