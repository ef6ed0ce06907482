"""`routed`: what a round computes, against plain loops, and what the rounds are for."""

from __future__ import annotations

import pytest
import torch
from factorctl_plugins.routed import (
    MASS_CAP,
    Masses,
    Routed,
    Router,
    active_experts,
    captured_mass,
    first_groups,
    neuron_masses,
    values,
)
from factorctl_plugins.transport import assign, regrets
from torch.nn.functional import silu

from factorctl.contracts import DenseFFN, LayerStats, PartitionSpec, Stat, TokenSample, UsageError, validate

TOPICS, NEURONS_EACH, WIDTH = 4, 6, 16


def hidden_of(ffn: DenseFFN, x_TD: torch.Tensor) -> torch.Tensor:
    return silu(x_TD @ ffn.gate_FD.float().T) * (x_TD @ ffn.up_FD.float().T)


def sample(ffn: DenseFFN, x_TD: torch.Tensor) -> TokenSample:
    return TokenSample(x_TD, hidden_of(ffn, x_TD), torch.ones(len(x_TD)))


def random_ffn(neurons: int = 24, width: int = WIDTH) -> DenseFFN:
    generator = torch.Generator().manual_seed(0)
    gate_FD, up_FD = torch.randn(2, neurons, width, generator=generator)
    return DenseFFN(gate_FD, up_FD, torch.randn(width, neurons, generator=generator))


def random_masses(tokens: int = 50, neurons: int = 24) -> Masses:
    generator = torch.Generator().manual_seed(1)
    return Masses(torch.randn(tokens, WIDTH, generator=generator), torch.rand(tokens, neurons, generator=generator))


def stats_of(ffn: DenseFFN, x_TD: torch.Tensor) -> LayerStats:
    return LayerStats(tokens=len(x_TD), sample=sample(ffn, x_TD))


def topical_ffn() -> tuple[DenseFFN, torch.Tensor, torch.Tensor]:
    """Neurons of four topics, in shuffled order, whose gate rows say nothing of the topic; the tokens; topic of each.

    A token lies along its topic's direction. Every gate row is open for every token (the gate rows share one direction
    that all tokens have), and what a neuron gives is decided by its up row, which is its topic's direction: what
    clustering gate rows cannot see, and a linear router can.
    """
    generator = torch.Generator().manual_seed(2)
    topic_F = torch.arange(TOPICS).repeat(NEURONS_EACH)
    topic_T = torch.randint(TOPICS, (600,), generator=generator)
    directions = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q
    x_TD = 3 * directions[topic_T] + 2 * directions[TOPICS] + 0.1 * torch.randn(600, WIDTH, generator=generator)
    gate_FD = directions[TOPICS] + 0.05 * torch.randn(len(topic_F), WIDTH, generator=generator)
    up_FD = directions[topic_F] + 0.05 * torch.randn(len(topic_F), WIDTH, generator=generator)
    return DenseFFN(gate_FD, up_FD, torch.randn(WIDTH, len(topic_F), generator=generator)), x_TD, topic_F


def test_it_finds_experts_that_clusters_of_gate_rows_cannot_see() -> None:
    ffn, x_TD, topic_F = topical_ffn()
    spec = PartitionSpec(TOPICS, layer=0, seed=0, top_k=1)
    clustered = Routed().partition(ffn, stats_of(ffn, x_TD), PartitionSpec(TOPICS, 0, 0, {"rounds": "0"}, top_k=1))
    assert max(len(topic_F[ids_H].unique()) for ids_H in clustered.experts_NH) > 1, "or the rounds have nothing to do"
    found = Routed().partition(ffn, stats_of(ffn, x_TD), spec)
    assert sorted(int(topic_F[ids_H].unique()) for ids_H in found.experts_NH) == list(range(TOPICS))


def test_neurons_that_every_topic_needs_become_shared() -> None:
    """The shared ones are found by the rounds too: large neurons that only one topic needs stay in its expert."""
    ffn, x_TD, topic_F = topical_ffn()
    everyone = torch.zeros(4, WIDTH)
    everyone[:] = ffn.gate_FD.mean(0)
    larger_FD = torch.where((topic_F == 0)[:, None], 1.3, 1.0) * ffn.up_FD
    widened = DenseFFN(
        torch.cat([ffn.gate_FD, everyone]), torch.cat([larger_FD, everyone]), torch.cat([ffn.down_DF] * 2, 1)[:, :28]
    )
    spec = PartitionSpec(TOPICS, layer=0, seed=0, top_k=1, shared_size=4)
    found = Routed().partition(widened, stats_of(widened, x_TD), spec)
    validate(found, num_neurons=28, num_experts=TOPICS, shared_size=4)
    assert found.shared_S is not None
    assert found.shared_S.tolist() == [24, 25, 26, 27]


@pytest.mark.parametrize("shared_size", [0, 4])
def test_values_and_captured_mass_match_plain_loops(shared_size: int) -> None:
    masses, spec = random_masses(), PartitionSpec(4, 0, 0, top_k=2, shared_size=shared_size)
    group_F = first_groups(random_ffn(), masses.s_TF.sum(0), spec)
    router = Router(masses.x_TD)
    router.fit(masses, group_F, 4)
    logits_TN = (masses.x_TD @ router.weight_DN).double()
    chosen = [set(row.topk(2).indices.tolist()) for row in logits_TN]
    value_FG = torch.zeros(24, 5, dtype=torch.float64)
    captured = 0.0
    for t, experts in enumerate(chosen):
        for f in range(24):
            s = float(masses.s_TF[t, f])
            value_FG[f, 0] += s
            for e in experts:
                value_FG[f, 1 + e] += s
            captured += s if int(group_F[f]) == 0 or int(group_F[f]) - 1 in experts else 0.0
    torch.testing.assert_close(values(masses, router, spec).double(), value_FG, rtol=1e-5, atol=1e-6)
    assert captured_mass(masses, router, group_F, spec) == pytest.approx(captured, rel=1e-5)


def test_the_router_is_the_ridge_regression_of_the_experts_masses() -> None:
    masses, spec = random_masses(), PartitionSpec(4, 0, 0, top_k=2)
    group_F = first_groups(random_ffn(), masses.s_TF.sum(0), spec)
    router = Router(masses.x_TD)
    router.fit(masses, group_F, 4)
    x = masses.x_TD.double()
    target = torch.stack([masses.s_TF.double()[:, group_F == e + 1].sum(1) for e in range(4)], dim=1)
    target = torch.stack([(row - row.mean()) / row.std(correction=0) for row in target])
    pull = 1e-3 * x.square().sum(0).mean()
    oracle = torch.linalg.solve(x.T @ x + pull * torch.eye(WIDTH, dtype=torch.float64), x.T @ target)
    torch.testing.assert_close(router.weight_DN.double(), oracle, rtol=1e-3, atol=1e-5)


def test_a_reassignment_never_lowers_what_its_own_choice_captures() -> None:
    masses, spec = random_masses(tokens=200), PartitionSpec(4, 0, 0, top_k=1, shared_size=4)
    group_F = first_groups(random_ffn(), masses.s_TF.sum(0), spec)
    router = Router(masses.x_TD)
    for _ in range(4):
        router.fit(masses, group_F, 4)
        moved_F = assign(regrets(values(masses, router, spec)), [4, 5, 5, 5, 5])
        assert captured_mass(masses, router, moved_F, spec) >= captured_mass(masses, router, group_F, spec) - 1e-3
        group_F = moved_F


def test_a_token_with_massive_activations_decides_nothing_alone() -> None:
    ffn = random_ffn()
    x_TD = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(3))
    x_TD[0] *= 1000
    mass_T = neuron_masses(ffn, sample(ffn, x_TD), layer=0).s_TF.sum(1)
    assert float(mass_T[0]) <= 1.01 * MASS_CAP * float(mass_T.median())
    assert float(hidden_of(ffn, x_TD).square().sum(1)[0]) > 1e6 * float(mass_T.median()), "or nothing was cut"


@pytest.mark.parametrize(("top_k", "active"), [(None, 4), (0, 4), (8, 4), (3, 3), (1, 1)])
def test_half_of_the_experts_are_taken_to_be_active_where_k_leaves_no_choice(top_k: int | None, active: int) -> None:
    assert active_experts(PartitionSpec(8, 0, 0, top_k=top_k)) == active


def test_values_of_any_range_reach_the_solver_in_one_that_it_resolves() -> None:
    value_FG = 10.0 ** torch.arange(-12, 12, dtype=torch.float64)[:, None] * torch.rand(
        24, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64
    )
    regret_FG = regrets(value_FG)
    assert float(regret_FG.max()) <= 1e6
    assert torch.equal(regret_FG.argmin(1), value_FG.argmax(1))
    assert assign(regret_FG, [6] * 4).bincount().tolist() == [6] * 4


@pytest.mark.parametrize(
    "stats", [None, LayerStats(tokens=5), LayerStats(tokens=0, sample=sample(random_ffn(), torch.zeros(0, 16)))]
)
def test_it_says_what_to_do_without_tokens(stats: LayerStats | None) -> None:
    with pytest.raises(UsageError, match="'routed' needs calibration tokens, and none were kept") as caught:
        Routed().partition(random_ffn(), stats, PartitionSpec(4, 0, 0))
    assert "--strategy clustered" in caught.value.hint


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_it_names_the_layer_whose_values_are_not_finite(value: float) -> None:
    ffn = random_ffn()
    ffn.gate_FD[3, 2] = value
    with pytest.raises(UsageError, match="layer 7 gives values that are not finite"):
        Routed().partition(ffn, stats_of(ffn, torch.randn(9, WIDTH)), PartitionSpec(4, 7, 0))


@pytest.mark.parametrize("rounds", ["-1", "many", "1001"])
def test_it_refuses_bad_rounds_before_any_weight_is_read(rounds: str) -> None:
    with pytest.raises(UsageError, match=f"strategy 'routed' cannot run rounds={rounds}") as caught:
        Routed().needs({"rounds": rounds})
    assert caught.value.hint == "choose a whole number from 0 to 1000"


def test_it_asks_for_tokens_and_for_nothing_else() -> None:
    assert Routed().needs({}) == {Stat.TOKENS}
