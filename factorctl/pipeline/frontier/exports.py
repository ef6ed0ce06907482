"""What the export of a split would weigh, and which stock engines would run it: known before it is made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from factorctl import __version__
from factorctl.checkpoint.manifest import Manifest
from factorctl.checkpoint.reader import CheckpointReader, TensorEntry
from factorctl.config.export import ExportConfig, ExportTarget
from factorctl.config.shape import FactorShape
from factorctl.exporting.engines import Engine, as_served
from factorctl.exporting.forms import form_for
from factorctl.exporting.stock.choice import architecture_for, blockers
from factorctl.exporting.stock.shards import planned_tensors
from factorctl.ffn.spec import FactoredSpec
from factorctl.models.building import empty_factored_model
from factorctl.models.filling import expected_tensors
from factorctl.models.loading import NativeCheckpoint
from factorctl.pipeline.factorize.plan import stored_dtype
from factorctl.pipeline.frontier.plan import FrontierPlan

LLAMA_CPP = "llama.cpp (--to gguf)"


@dataclass(frozen=True)
class Export:
    """One export in prospect."""

    target: ExportTarget | Literal["native"]
    """`native` where no stock form holds the split: it stays the checkpoint."""
    bytes: int
    """Of its weights."""
    engines: dict[str, bool]
    """Whether each stock engine runs it and computes what it should."""


def export_of(plan: FrontierPlan, shape: FactorShape) -> Export:
    """The export that most engines take: a stock mixture of experts, or a narrower dense model where nothing is routed.

    That dense model is of the source's own class, and engines run it as they run the source.
    """
    spec = with_scales(plan, shape)
    target: ExportTarget = "hf" if shape.routes else "dense"
    checkpoint, reader = _in_prospect(plan, spec)
    engines = _engines(plan, spec, target)
    if blockers(plan.dense, spec, target):
        return Export("native", sum(entry.nbytes for entry in reader.entries.values()), engines)
    form = form_for(checkpoint, ExportConfig(target=target), reader)
    return Export(target, sum(tensor.nbytes for tensor in planned_tensors(form.layout, reader)), engines)


def with_scales(plan: FrontierPlan, shape: FactorShape) -> FactoredSpec:
    """The split with some scale in place of those that are not fitted yet: they decide neither sizes nor engines."""
    spec = plan.spec(shape)
    scales = (1.0,) * plan.layers if spec.scale == "fitted" else ()
    return FactoredSpec(spec.shape, spec.gate, spec.scale, scales)


def _engines(plan: FrontierPlan, spec: FactoredSpec, target: ExportTarget) -> dict[str, bool]:
    if target == "dense":
        return dict.fromkeys(sorted([*Engine, LLAMA_CPP]), True)
    able = architecture_for(plan.dense, spec).engines_that_run(as_served(plan.dense, spec))
    if blockers(plan.dense, spec, "hf"):
        able = []
    found = {**{str(engine): engine in able for engine in Engine}, LLAMA_CPP: not blockers(plan.dense, spec, "gguf")}
    return dict(sorted(found.items()))


def _in_prospect(plan: FrontierPlan, spec: FactoredSpec) -> tuple[NativeCheckpoint, CheckpointReader]:
    """The native checkpoint that `factorize` would write: its sizes without its values."""
    manifest = Manifest("native", "factorize", __version__, source={}, factored=spec.summary())
    place = Path(plan.out / "checkpoint")
    entries = [
        TensorEntry(name, place.name, _dtype_of(plan, name), shape, 0)
        for name, shape in expected_tensors(empty_factored_model(plan.dense, spec)).items()
    ]
    return NativeCheckpoint(place, manifest, plan.dense, spec), CheckpointReader.of_entries(place, entries)


def _dtype_of(plan: FrontierPlan, name: str) -> torch.dtype:
    if name.endswith("neuron_ids"):
        return torch.int32
    entries = plan.reader.entries
    like = entries.get(name) or entries[next(iter(plan.dense.ffn_tensor_names(0).values()))]
    return stored_dtype(plan.base.config, like)
