"""One decoder layer from dense to factored: by its weights alone, or behind calibration.

T tokens, D hidden_size, F intermediate_size, N num_experts, S shared_size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from factorctl.calibration.closed_form import expert_load, near_ties
from factorctl.calibration.compressed_stream import CalibrationStream
from factorctl.calibration.layer_fit import LayerFit
from factorctl.checkpoint.reader import CheckpointReader, all_finite
from factorctl.config.common import DTypeName
from factorctl.config.factorize import FactorizeConfig
from factorctl.contracts import (
    DenseFFN,
    LayerStats,
    Partition,
    PartitionSpec,
    PartitionStrategy,
    Stat,
    chooses_shared,
    validate,
)
from factorctl.errors import UsageError
from factorctl.ffn.dense import cast_ffn
from factorctl.ffn.layer import FactoredFFN
from factorctl.ffn.slicing import FactoredTensors, slice_ffn
from factorctl.ffn.spec import FactoredSpec
from factorctl.models.building import filled_ffn
from factorctl.models.families import DenseModel
from factorctl.models.identity import check_identity
from factorctl.pipeline.common.devices import storage_dtype

SAMPLE_TOKENS = 32
"""Tokens on which the identity of a layer is checked."""
ROUTER_STD = 0.02
"""Of a router before anything was learned, as in FactorLLM."""
HELDOUT_SHARE = 1 / 8
"""Share of the calibration tokens that judges the refit and never enters it."""


@dataclass(frozen=True)
class FactoredLayer:
    """The tensors of one factored FFN in storage dtype, and what the manifest says of the layer."""

    tensors: FactoredTensors
    record: dict[str, Any]


@dataclass
class LayerFactory:
    """Factors the layers of one model, in order.

    Args:
        needs: the statistics that the partition asks for.
        dtype: what the layers are stored in; `auto` keeps the source's.
        fit: the closed-form steps that are taken behind a compressed `stream`.
        stream: None where nothing needs calibration.
    """

    dense: DenseModel
    spec: FactoredSpec
    strategy: PartitionStrategy
    reader: CheckpointReader
    needs: frozenset[Stat]
    seed: int = 0
    dtype: DTypeName = "auto"
    strategy_options: Mapping[str, str] = field(default_factory=dict)
    fit: LayerFit = field(default_factory=LayerFit)
    stream: CalibrationStream | None = None

    @classmethod
    def of(
        cls,
        config: FactorizeConfig,
        dense: DenseModel,
        spec: FactoredSpec,
        strategy: PartitionStrategy,
        reader: CheckpointReader,
        needs: frozenset[Stat],
        stream: CalibrationStream | None = None,
    ) -> LayerFactory:
        """With the seed, the dtype, the strategy's options and the steps that a factorization was asked for."""
        fit = LayerFit(config.router == "analytic", spec.scale == "fitted", config.refit, config.load_limit)
        return cls(
            dense, spec, strategy, reader, needs, config.seed, config.dtype, config.strategy_options, fit, stream
        )

    @torch.no_grad()
    def factor(self, layer: int) -> FactoredLayer:
        """Partition, slice, prove the identity, then take the closed-form steps that were asked for."""
        source = self.dense.read_ffn(layer, self.reader.read)
        ffn = as_stored(layer, source, self.dtype)
        stats = self._observe(layer, source, ffn)
        partition = self.partition(layer, ffn, stats)
        router_ND = random_router(self.spec.shape.num_experts, self.dense.hidden_size, seed=self.seed, layer=layer)
        tensors = slice_ffn(ffn, partition, router_ND.to(ffn.gate_FD.dtype))
        record: dict[str, Any] = {
            "permutation_sha256": hashlib.sha256(tensors["neuron_ids"].numpy().tobytes()).hexdigest(),
            "identity_error": check_identity(self.dense, self.spec, layer, ffn, tensors, self._identity_inputs(layer)),
        }
        if stats is not None and partition.shared_S is not None and stats.importance_F is not None:
            record["shared_importance"] = float(stats.importance_F[partition.shared_S].sum() / stats.importance_F.sum())
        if self.stream is not None:
            fitted = self._close_in(layer, tensors, record) if self.stream.compressed else None
            self.stream.leave(layer, fitted)
        return FactoredLayer(tensors, record)

    def replay(self, layer: int, finished: FactoredTensors, record: dict[str, Any]) -> None:
        """Bring the calibration stream past a layer that an earlier run finished."""
        if self.stream is None:
            return
        with torch.no_grad():
            source = self.dense.read_ffn(layer, self.reader.read)
            self.stream.enter(layer, source, as_stored(layer, source, self.dtype))
            ffn = self._module(layer, finished)
            ffn.scale_a = record.get("fitted_a", ffn.scale_a)
            self.stream.leave(layer, ffn)

    def _observe(self, layer: int, source: DenseFFN, ffn: DenseFFN) -> LayerStats | None:
        if self.stream is None:
            return None
        self.stream.enter(layer, source, ffn)
        return self.stream.statistics(self.needs) if self.needs else None

    def _close_in(self, layer: int, tensors: FactoredTensors, record: dict[str, Any]) -> FactoredFFN:
        """Router, scale and refit on the compressed stream; writes what was fitted into `tensors` and `record`."""
        assert self.stream is not None
        ffn, tokens = self._module(layer, tensors), self.stream.tokens
        fitting, heldout = tokens.split(round(len(tokens) * (1 - HELDOUT_SHARE)))
        fitted = self.fit.apply(ffn, fitting, heldout, tensors["down"].dtype)
        if self.fit.router:
            self._write_back(tensors, "router", ffn)
        if self.fit.scale:
            record["fitted_a"] = ffn.scale_a
        if fitted.refit is not None:
            record["refit"] = asdict(fitted.refit)
            self._write_back(tensors, "down", ffn)
        record["output_error"] = fitted.error
        if ffn.routes:
            logits_TN = ffn.router_logits(tokens.x_TD)
            record["near_ties"] = near_ties(logits_TN, ffn.top_k)
            record["expert_load"] = expert_load(logits_TN, ffn.top_k)
        return ffn

    def partition(self, layer: int, ffn: DenseFFN, stats: LayerStats | None) -> Partition:
        """Shared neurons by importance, unless the strategy chooses them, the others by the strategy; validated."""
        shape, chosen_here = self.spec.shape, self.spec.shape.shared_size and not chooses_shared(self.strategy)
        spec = PartitionSpec(
            shape.num_experts,
            layer,
            self.seed,
            self.strategy_options,
            top_k=shape.top_k,
            shared_size=0 if chosen_here else shape.shared_size,
        )
        part = self._partition_unshared(ffn, stats, spec) if chosen_here else self.strategy.partition(ffn, stats, spec)
        return validate(
            part, num_neurons=ffn.intermediate_size, num_experts=shape.num_experts, shared_size=shape.shared_size
        )

    def _partition_unshared(self, ffn: DenseFFN, stats: LayerStats | None, spec: PartitionSpec) -> Partition:
        """The most important neurons shared; the strategy sees the others alone."""
        assert stats is not None
        assert stats.importance_F is not None
        order_F = torch.argsort(stats.importance_F, descending=True, stable=True)
        shared_S, routed_R = (ids.sort().values for ids in order_F.tensor_split([self.spec.shape.shared_size]))
        part = self.strategy.partition(ffn.select(routed_R), stats.select(routed_R), spec)
        validate(part, num_neurons=len(routed_R), num_experts=spec.num_experts)
        return Partition(routed_R[part.experts_NH], shared_S)

    def _identity_inputs(self, layer: int) -> torch.Tensor:
        if self.stream is not None:
            return self.stream.tokens.x_TD[:SAMPLE_TOKENS].cpu()
        generator = torch.Generator().manual_seed(layer)
        return torch.randn(SAMPLE_TOKENS, self.dense.hidden_size, generator=generator)

    def _module(self, layer: int, tensors: FactoredTensors) -> FactoredFFN:
        spec = self.spec if self.spec.fitted_a else replace(self.spec, scale="sum")
        assert self.stream is not None
        moved = {name: tensor.to(self.stream.device) for name, tensor in tensors.items()}
        ffn = filled_ffn(self.dense, spec, layer, moved, dtype=torch.float32)
        if self.spec.scale == "paper":
            ffn.scale_a = self.spec.scale_a(layer)
        return ffn

    @staticmethod
    def _write_back(tensors: FactoredTensors, name: str, ffn: FactoredFFN) -> None:
        """Round to storage dtype, and let the stream run what was stored, not what was computed."""
        parameter = ffn.get_parameter(name)
        tensors[name] = parameter.detach().to("cpu", tensors[name].dtype).clone()
        parameter.copy_(tensors[name])


def random_router(num_experts: int, hidden_size: int, *, seed: int, layer: int) -> torch.Tensor:
    """[N, D] float32, normal with standard deviation 0.02; the same for the same seed and layer."""
    generator = torch.Generator().manual_seed(seed * 100_003 + layer)
    return torch.randn(num_experts, hidden_size, generator=generator) * ROUTER_STD


def as_stored(layer: int, source: DenseFFN, dtype: DTypeName) -> DenseFFN:
    """The dense FFN in the dtype in which it will be stored.

    Raises:
        UsageError: it has values beyond that dtype's range.
    """
    stored = storage_dtype(dtype, source.gate_FD.dtype)
    if stored == source.gate_FD.dtype:
        return source
    cast = cast_ffn(source, stored)
    if not all(all_finite(tensor) for tensor in (cast.gate_FD, cast.up_FD, cast.down_DF)):
        raise UsageError(
            f"layer {layer}: FFN weights have values beyond the range of {dtype}", "choose --dtype bfloat16 or auto"
        )
    return cast
