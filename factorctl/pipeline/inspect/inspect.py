"""`factorctl inspect`: what a checkpoint is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from factorctl.checkpoint.manifest import read_manifest
from factorctl.checkpoint.reader import CheckpointReader
from factorctl.errors import UsageError
from factorctl.ffn.labels import dead_experts
from factorctl.models.loading import open_checkpoint, read_factored_ffn
from factorctl.pipeline.common.layer_records import recorded_load


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint is; the keys of `inspect --format json`."""

    checkpoint: str
    kind: str
    stage: str
    manifest_sha256: str
    parent: str | None
    source: dict[str, Any]
    factored: dict[str, Any]
    strategy: dict[str, Any]
    identity_error: float | None
    calibration: dict[str, Any] | None
    libraries: dict[str, str]
    files: int
    bytes: int
    idle_experts: list[tuple[int, int]] | None
    """(layer, expert) of those that hardly any calibration token chose; None where that was not recorded."""
    largest_load: float | None
    """Of any expert, in even shares."""
    layers: list[dict[str, Any]]


def inspect_checkpoint(path: Path) -> Inspection:
    """Read the manifest alone; no weights.

    Raises:
        UsageError: no artefact here.
        IntegrityError: the manifest is damaged.
    """
    manifest = read_manifest(path)
    details = manifest.details
    records, top_k = list(details.get("layers") or []), manifest.factored["top_k"]
    load_LN = recorded_load(records)
    return Inspection(
        checkpoint=str(path),
        kind=manifest.kind,
        stage=manifest.stage,
        manifest_sha256=manifest.sha256,
        parent=manifest.parent,
        source=dict(manifest.source),
        factored=dict(manifest.factored),
        strategy=dict(details.get("strategy") or {}),
        identity_error=details.get("identity_error"),
        calibration=details.get("calibration"),
        libraries=dict(manifest.libraries),
        files=len(manifest.files),
        bytes=manifest.total_bytes,
        idle_experts=dead_experts(load_LN, top_k) if load_LN else None,
        largest_load=max(max(row) * len(row) / top_k for row in load_LN) if load_LN else None,
        layers=records,
    )


@dataclass(frozen=True)
class LayerInspection:
    """Sizes and importance shares of one layer's experts."""

    checkpoint: str
    layer: int
    record: dict[str, Any]
    groups: list[dict[str, Any]]
    """Per expert, shared neurons first: name, neurons, share of ||W_down||^2, share of ||W_gate||^2, router norm."""


def inspect_layer(path: Path, layer: int) -> LayerInspection:
    """Read one layer's FFN and weigh its experts against one another."""
    checkpoint = open_checkpoint(path, verify=False)
    if not 0 <= layer < checkpoint.dense.num_layers:
        raise UsageError(
            f"--layer {layer} is not in this model", f"it has layers 0 to {checkpoint.dense.num_layers - 1}"
        )
    tensors = read_factored_ffn(CheckpointReader(path), layer)
    shape = checkpoint.spec.shape
    down_F = tensors["down"].float().square().sum(0)
    routed_N = down_F[shape.shared_size :].view(shape.num_experts, -1).sum(1) / down_F.sum()
    gate_N = tensors["gate_up"][:, : shape.expert_size].float().square().sum((1, 2))
    shared_gate = tensors["shared_gate_up"][: shape.shared_size].float().square().sum() if shape.shared_size else 0.0
    gate_total = float(gate_N.sum()) + float(shared_gate)
    groups: list[dict[str, Any]] = [
        {
            "expert": expert,
            "neurons": shape.expert_size,
            "down_share": float(routed_N[expert]),
            "gate_share": float(gate_N[expert]) / gate_total,
            "router_norm": float(tensors["router"][expert].float().norm()),
        }
        for expert in range(shape.num_experts)
    ]
    if shape.shared_size:
        shared: dict[str, Any] = {
            "expert": "shared",
            "neurons": shape.shared_size,
            "down_share": float(down_F[: shape.shared_size].sum() / down_F.sum()),
            "gate_share": float(shared_gate) / gate_total,
            "router_norm": None,
        }
        groups.insert(0, shared)
    records = checkpoint.manifest.details.get("layers") or []
    return LayerInspection(str(path), layer, dict(records[layer]) if layer < len(records) else {}, groups)
