"""What each shipped strategy is for, beyond the contract that all strategies keep."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from factorctl_plugins.clustered import Clustered
from factorctl_plugins.contiguous import Contiguous
from factorctl_plugins.permuted import Permuted

from factorctl.contracts import DenseFFN, LayerStats, PartitionSpec, PartitionStrategy, Stat, UsageError


def random_ffn(intermediate_size: int = 48, hidden_size: int = 8) -> DenseFFN:
    generator = torch.Generator().manual_seed(0)
    gate_FD, up_FD = torch.randn(2, intermediate_size, hidden_size, generator=generator)
    return DenseFFN(gate_FD, up_FD, torch.randn(hidden_size, intermediate_size, generator=generator))


def ids(strategy: PartitionStrategy, ffn: DenseFFN, spec: PartitionSpec, stats: LayerStats | None = None) -> list[int]:
    return [int(neuron) for neuron in strategy.partition(ffn, stats, spec).permutation_F]


def test_contiguous_keeps_the_order_whatever_the_seed() -> None:
    assert ids(Contiguous(), random_ffn(), PartitionSpec(4, layer=3, seed=7)) == list(range(48))


def test_permuted_draws_anew_for_every_layer_and_seed() -> None:
    pairs = [(seed, layer) for seed in range(4) for layer in range(4)]
    splits = {tuple(ids(Permuted(), random_ffn(), PartitionSpec(4, layer, seed))) for seed, layer in pairs}
    assert len(splits) == len(pairs), "seed + layer alone would repeat layer 0 of seed 1 as layer 1 of seed 0"
    assert tuple(range(48)) not in splits


def test_permuted_golden() -> None:
    """Published manifests name this strategy and a seed: the same seed has to mean the same split for good."""
    assert ids(Permuted(), random_ffn(8), PartitionSpec(2, layer=1, seed=42)) == [6, 0, 2, 5, 4, 7, 1, 3]


def planted_ffn(num_experts: int = 4, expert_size: int = 12) -> tuple[DenseFFN, torch.Tensor]:
    """An FFN whose gate rows lie around `num_experts` directions, in shuffled order, and the group of each neuron."""
    generator = torch.Generator().manual_seed(1)
    group_F = torch.arange(num_experts).repeat(expert_size)
    rows_FD = 10 * torch.eye(8)[group_F] + torch.randn(len(group_F), 8, generator=generator)
    lengths_F1 = 0.01 + 10 * torch.rand(len(group_F), 1, generator=generator)
    return DenseFFN(rows_FD * lengths_F1, torch.randn(len(group_F), 8), torch.randn(8, len(group_F))), group_F


def test_clustered_finds_the_directions_of_gate_rows_of_very_different_lengths() -> None:
    ffn, group_F = planted_ffn()
    for seed in range(5):
        experts_NH = Clustered().partition(ffn, None, PartitionSpec(4, 0, seed)).experts_NH
        assert all(len(group_F[ids_H].unique()) == 1 for ids_H in experts_NH)


def test_clustered_by_activations_groups_neurons_that_fire_together_whatever_their_weights() -> None:
    generator = torch.Generator().manual_seed(2)
    group_F = torch.arange(4).repeat(12)
    topic_P = torch.randint(4, (200,), generator=generator)
    flips_PF = torch.rand(200, 48, generator=generator) < 0.1
    stats = LayerStats(tokens=200, patterns_PF=(topic_P[:, None] == group_F) ^ flips_PF)
    spec = PartitionSpec(4, 0, 0, {"by": "activations"})
    experts_NH = Clustered().partition(random_ffn(), stats, spec).experts_NH
    assert all(len(group_F[ids_H].unique()) == 1 for ids_H in experts_NH)


@pytest.mark.parametrize(
    ("options", "needed"),
    [({}, set()), ({"by": "weights", "iterations": "3"}, set()), ({"by": "activations"}, {Stat.PATTERNS})],
)
def test_clustered_asks_for_calibration_only_by_activations(options: Mapping[str, str], needed: set[Stat]) -> None:
    assert Clustered().needs(options) == needed


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"by": "weight"}, "strategy 'clustered' has no by=weight", "did you mean 'weights'?"),
        ({"by": "magic"}, "strategy 'clustered' has no by=magic", "known: activations, weights"),
        ({"iterations": "0"}, "strategy 'clustered' cannot run iterations=0", "a whole number from 1 to 1000"),
        ({"iterations": "2.5"}, "strategy 'clustered' cannot run iterations=2.5", "a whole number from 1 to 1000"),
        ({"iterations": "1001"}, "strategy 'clustered' cannot run iterations=1001", "a whole number from 1 to 1000"),
    ],
)
def test_clustered_refuses_bad_values_before_any_weight_is_read(
    options: Mapping[str, str], message: str, hint: str
) -> None:
    with pytest.raises(UsageError) as caught:
        Clustered().needs(options)
    assert caught.value.message == message
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize("stats", [None, LayerStats(tokens=5)])
def test_clustered_by_activations_says_what_to_do_without_patterns(stats: LayerStats | None) -> None:
    with pytest.raises(UsageError, match="needs firing patterns, and none were calibrated") as caught:
        Clustered().partition(random_ffn(), stats, PartitionSpec(4, 0, 0, {"by": "activations"}))
    assert "by=weights" in (caught.value.hint or "")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_clustered_names_the_layer_whose_weights_are_not_finite(value: float) -> None:
    ffn = random_ffn()
    ffn.gate_FD[3, 2] = value
    with pytest.raises(UsageError, match="layer 17 has weights that are not finite"):
        Clustered().partition(ffn, None, PartitionSpec(4, layer=17, seed=0))
