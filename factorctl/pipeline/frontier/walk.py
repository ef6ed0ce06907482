"""One split on its own way through the layers, fitted as `factorize` fits it.

While many are tried, all K of one (N, S) have the partition in common that the shared pass found; the split that is
chosen is partitioned for itself, and then is what `factorize` makes, value by value.

T tokens, D hidden_size, L layers, N num_experts, K top_k, S shared_size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from factorctl.calibration.compressed_stream import CalibrationStream
from factorctl.calibration.stream import LayerwiseModel
from factorctl.config.shape import FactorShape
from factorctl.contracts import PartitionStrategy, Stat
from factorctl.ffn.slicing import FactoredTensors
from factorctl.ffn.spec import FactoredSpec
from factorctl.partitions import get_strategy
from factorctl.pipeline.factorize.layers import LayerFactory
from factorctl.pipeline.frontier.partitions import Remembered, SharedPass, judged
from factorctl.pipeline.frontier.plan import FrontierPlan
from factorctl.pipeline.frontier.splits import family_of, name_of
from factorctl.progress import Progress


@dataclass(frozen=True)
class Walked:
    """A split that came through all layers, or was dropped behind a third of them."""

    spec: FactoredSpec
    layers: list[FactoredTensors]
    drift: float
    """Median over tokens of ||h - h_dense|| / ||h_dense||, h the residual stream behind a third of the layers."""
    dropped: str | None
    """Why it was dropped."""


@torch.no_grad()
def walk(
    plan: FrontierPlan,
    shape: FactorShape,
    shared: SharedPass,
    ids_BL: torch.Tensor,
    hopeless: Callable[[float], str | None],
    progress: Progress,
    *,
    own_partition: bool = False,
) -> Walked:
    """Factor every layer for `shape`.

    Args:
        own_partition: partition the split's own stream for its own K, which is all that `factorize` does otherwise.
        hopeless: from the drift behind a third of the layers to why the split is dropped; None goes on.
    """
    factory = _factory(plan, shape, None if own_partition else shared, ids_BL)
    layers: list[FactoredTensors] = []
    scales: list[float] = []
    drift = 0.0
    with progress.stage(f"Fitting {name_of(shape)}", total=plan.layers, unit="layers") as task:
        for layer in range(plan.layers):
            made = factory.factor(layer)
            layers.append(made.tensors)
            scales.append(made.record.get("fitted_a", 1.0))
            task.advance(layer=layer)
            if layer + 1 == plan.third:
                assert factory.stream is not None
                drift = drift_of(judged(factory.stream.residual_TD), shared.judged_TD)
                if (reason := hopeless(drift)) is not None:
                    return Walked(factory.spec, [], drift, reason)
    spec = replace(factory.spec, fitted_a=tuple(scales)) if factory.spec.scale == "fitted" else factory.spec
    return Walked(spec, layers, drift, None)


def _factory(plan: FrontierPlan, shape: FactorShape, shared: SharedPass | None, ids_BL: torch.Tensor) -> LayerFactory:
    config = plan.factorize_config(shape)
    strategy: PartitionStrategy = plan.base.strategy
    needs = plan.needs
    if not shape.routes:
        strategy, needs = get_strategy(str(config.strategy))[0], frozenset({Stat.IMPORTANCE})
    elif shared is not None:
        strategy, needs = Remembered(shared.neuron_ids_LF[family_of(shape)]), frozenset()
    stream = CalibrationStream(
        LayerwiseModel(plan.dense, plan.reader, ids_BL, plan.device), compressed=shape.routes or config.refit
    )
    return LayerFactory.of(config, plan.dense, plan.spec(shape), strategy, plan.reader, needs, stream)


def drift_of(stream_TD: torch.Tensor, dense_TD: torch.Tensor) -> float:
    """Median over tokens of the relative distance: a few massive activations decide nothing."""
    return float(((stream_TD - dense_TD).norm(dim=1) / dense_TD.norm(dim=1).clamp_min(1e-20)).median())
