"""Group neurons that do alike, so that a token finds what it needs in few experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch

from factorctl.contracts import (
    DenseFFN,
    LayerStats,
    Partition,
    PartitionSpec,
    Stat,
    UsageError,
    did_you_mean,
)

from .balanced_kmeans import balanced_kmeans
from .options import whole_number
from .seeding import layer_generator

MAX_ITERATIONS = 1000


class Feature(StrEnum):
    """What two neurons of a cluster have in common (`--option by=...`)."""

    WEIGHTS = "weights"
    """The direction of the gate row (MoEfication)."""
    ACTIVATIONS = "activations"
    """The calibration tokens for which they are among the most active tenth (CMoE)."""


@dataclass(frozen=True)
class ClusterOptions:
    """The `--option` values of the strategy, checked."""

    by: Feature = Feature.WEIGHTS
    """Weights by default: nothing has to be calibrated."""
    iterations: int = 20
    """k-means rounds at most."""

    @classmethod
    def parse(cls, options: Mapping[str, str]) -> ClusterOptions:
        """Raises:
        UsageError: for a value that is no feature or no number of rounds.
        """
        return cls(
            by=_feature(options.get("by", cls.by)),
            iterations=whole_number(
                "clustered", "iterations", options.get("iterations", str(cls.iterations)), low=1, high=MAX_ITERATIONS
            ),
        )


class Clustered:
    """Balanced k-means over one feature vector per neuron.

    Options:
        by: `weights` (default) or `activations`.
        iterations: k-means rounds at most, default 20.

    by=weights clusters the gate rows, scaled to length one as MoEfication does. Whether a neuron of a gated FFN opens
    for a token is decided by the angle between its gate row and the token; the row's length only says how wide.
    Unscaled, the squared distance would first of all sort neurons by length, which no router can use.

    by=activations clusters the columns of `stats.patterns_PF`, left as they are (CMoE): the squared distance of two
    columns counts the tokens for which exactly one of the two neurons is active. Scaling them would make
    neurons that fire once in 4096 tokens as influential as those that fire for half.
    """

    name = "clustered"
    reference = "MoEfication, https://arxiv.org/abs/2110.01786; CMoE, https://arxiv.org/abs/2502.04416"
    option_names = frozenset({"by", "iterations"})

    def needs(self, options: Mapping[str, str]) -> frozenset[Stat]:
        by = ClusterOptions.parse(options).by
        return frozenset({Stat.PATTERNS}) if by is Feature.ACTIVATIONS else frozenset()

    def partition(self, ffn: DenseFFN, stats: LayerStats | None, spec: PartitionSpec) -> Partition:
        options = ClusterOptions.parse(spec.options)
        features_FC = gate_directions(ffn) if options.by is Feature.WEIGHTS else firing_patterns(stats)
        if not features_FC.isfinite().all():
            raise UsageError(
                f"layer {spec.layer} has {options.by} that are not finite, so its neurons cannot be clustered",
                "check the source checkpoint, or use --strategy permuted",
            )
        return Partition(
            balanced_kmeans(
                features_FC, spec.num_experts, generator=layer_generator(spec), iterations=options.iterations
            )
        )


def gate_directions(ffn: DenseFFN) -> torch.Tensor:
    """The gate rows at length one, [F, D] float32; a row of zeros stays zero."""
    return torch.nn.functional.normalize(ffn.gate_FD.detach().float(), dim=1)


def firing_patterns(stats: LayerStats | None) -> torch.Tensor:
    """For each neuron the calibration tokens for which it fires, [F, P] float32 of zeros and ones.

    Raises:
        UsageError: when calibration kept no patterns.
    """
    if stats is None or stats.patterns_PF is None:
        raise UsageError(
            "strategy 'clustered' with by=activations needs firing patterns, and none were calibrated",
            "use --option by=weights, which needs no calibration",
        )
    return stats.patterns_PF.T.float().contiguous()


def _feature(value: str) -> Feature:
    try:
        return Feature(value)
    except ValueError:
        raise UsageError(f"strategy 'clustered' has no by={value}", did_you_mean(value, list(Feature))) from None
