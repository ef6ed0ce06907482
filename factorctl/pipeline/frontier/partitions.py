"""The one calibration pass that all splits share: partitions of every (N, S), and how the dense model goes.

It runs on the dense model's own stream. A partition is found for the middle of the K that are swept over it.

L layers, T tokens, D hidden_size, F intermediate_size, S shared_size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from factorctl.calibration.compressed_stream import CalibrationStream
from factorctl.calibration.stream import LayerwiseModel
from factorctl.config.shape import FactorShape
from factorctl.contracts import DenseFFN, LayerStats, Partition, PartitionSpec, Stat
from factorctl.pipeline.factorize.layers import HELDOUT_SHARE, LayerFactory, as_stored
from factorctl.pipeline.frontier.plan import FrontierPlan
from factorctl.pipeline.frontier.splits import family_of
from factorctl.pipeline.frontier.state import SearchState
from factorctl.progress import Progress

JUDGED_TOKENS = 1024
"""The most tokens on which a split is held against the dense model on its way through the layers."""
DENSE = "dense-stream"


@dataclass(frozen=True)
class SharedPass:
    """What the pass gave."""

    neuron_ids_LF: Mapping[str, torch.Tensor]
    """By family: neuron ids in storage order, shared ones first."""
    judged_TD: torch.Tensor
    """The dense model's residual stream behind a third of the layers, on the tokens that `judged` takes."""


class Remembered:
    """A partition strategy that hands out what the shared pass found."""

    name, reference, option_names, chooses_shared = "remembered", "", frozenset[str](), True

    def __init__(self, neuron_ids_LF: torch.Tensor) -> None:
        self._ids_LF = neuron_ids_LF

    def needs(self, options: Mapping[str, str]) -> frozenset[Stat]:
        return frozenset()

    def partition(self, ffn: DenseFFN, stats: LayerStats | None, spec: PartitionSpec) -> Partition:
        shared_S, routed_R = self._ids_LF[spec.layer].long().tensor_split([spec.shared_size])
        return Partition(routed_R.view(spec.num_experts, -1), shared_S if spec.shared_size else None)


def judged(stream_TD: torch.Tensor) -> torch.Tensor:
    """Of a stream the tokens that judge a refit and enter none, every so manieth of them, [T, D]."""
    heldout_TD = stream_TD[round(len(stream_TD) * (1 - HELDOUT_SHARE)) :]
    return heldout_TD[:: max(1, len(heldout_TD) // JUDGED_TOKENS)].cpu().clone()


@torch.no_grad()
def shared_pass(
    plan: FrontierPlan,
    shapes: Sequence[FactorShape],
    ids_BL: torch.Tensor,
    state: SearchState,
    progress: Progress,
) -> SharedPass:
    """Partition every layer for every family that an earlier run did not, in one walk over the dense model."""
    missing = [shape for shape in shapes if state.found(family_of(shape)) is None]
    if missing or state.found(DENSE) is None:
        found, judged_TD = _walk(plan, missing, ids_BL, progress)
        for name, ids_LF in found.items():
            state.keep(name, {}, {"neuron_ids": ids_LF})
        state.keep(DENSE, {}, {"stream": judged_TD})
    return SharedPass(
        {family_of(shape): state.tensors(family_of(shape))["neuron_ids"] for shape in shapes},
        state.tensors(DENSE)["stream"],
    )


def _walk(
    plan: FrontierPlan, shapes: Sequence[FactorShape], ids_BL: torch.Tensor, progress: Progress
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    dense, reader = plan.dense, plan.reader
    needs = plan.needs
    stream = CalibrationStream(LayerwiseModel(dense, reader, ids_BL, plan.device), compressed=False)
    factories = {
        family_of(shape): LayerFactory.of(
            plan.factorize_config(shape), dense, plan.spec(shape), plan.base.strategy, reader, needs
        )
        for shape in shapes
    }
    ids: dict[str, list[torch.Tensor]] = {name: [] for name in factories}
    judged_TD = torch.empty(0)
    title = f"Partitioning for {', '.join(factories)}" if factories else "Running the dense model"
    with progress.stage(title, total=dense.num_layers, unit="layers") as task:
        for layer in range(dense.num_layers):
            source = dense.read_ffn(layer, reader.read)
            ffn = as_stored(layer, source, plan.base.config.dtype)
            stream.enter(layer, source, ffn)
            if factories:
                stats = stream.statistics(needs)
                for name, factory in factories.items():
                    ids[name].append(factory.partition(layer, ffn, stats).permutation_F.to(torch.int32))
                del stats
            stream.leave(layer, None)
            if layer + 1 == plan.third:
                judged_TD = judged(stream.residual_TD)
                if not factories:
                    break
            task.advance(layer=layer)
    return {name: torch.stack(rows) for name, rows in ids.items()}, judged_TD
