"""`inspect`, `verify`, `plugins` and `doctor`: what is here, is it whole, what can be chosen, what this machine has."""

from __future__ import annotations

import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from factorctl import __version__
from factorctl.checkpoint.aliases import ALIASES
from factorctl.checkpoint.manifest import check_files, read_manifest
from factorctl.checkpoint.reader import CheckpointReader
from factorctl.errors import IntegrityError, UsageError
from factorctl.ffn.kernel.cpu import reason_without
from factorctl.ffn.labels import dead_experts
from factorctl.ffn.slicing import unslice_ffn
from factorctl.files.cache import cache_directory
from factorctl.memory import available_memory
from factorctl.models.bfloat16 import has_fast_bfloat16
from factorctl.models.building import empty_factored_model
from factorctl.models.dense_ffn import IDENTITY_TOLERANCE, identity_error
from factorctl.models.loading import NativeCheckpoint, open_checkpoint, read_factored_ffn, stored_tensors
from factorctl.partitions import StrategyInfo, available
from factorctl.pipeline.common.layer_records import recorded_load
from factorctl.pipeline.common.provenance import library_versions
from factorctl.processor import processor_name
from factorctl.progress import Progress


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


@dataclass(frozen=True)
class Verification:
    """What was checked and held."""

    checkpoint: str
    manifest_sha256: str
    files: int
    bytes: int
    tensors: int | None
    identity_error: float | None


def verify_checkpoint(path: Path, *, identity: bool, progress: Progress) -> Verification:
    """Hash every file, account for every tensor, and on request run every layer with all experts on.

    Raises:
        IntegrityError: naming the first file or tensor that is not as promised.
    """
    manifest = read_manifest(path)
    with progress.stage("Hashing", total=len(manifest.files), unit="file") as task:
        for _ in check_files(path, manifest):
            task.advance()
    tensors, error = None, None
    if manifest.kind == "native":
        checkpoint = open_checkpoint(path, verify=False)
        tensors = len(stored_tensors(empty_factored_model(checkpoint.dense, checkpoint.spec), CheckpointReader(path)))
        error = _identity_error(checkpoint, progress) if identity else None
    elif identity:
        raise UsageError(
            "--identity needs a native checkpoint", "an export is checked against its parent when it is made"
        )
    return Verification(str(path), manifest.sha256, len(manifest.files), manifest.total_bytes, tensors, error)


def _identity_error(checkpoint: NativeCheckpoint, progress: Progress) -> float:
    """Largest relative error over the layers of all experts on against the same neurons as one dense FFN."""
    dense, reader, worst = checkpoint.dense, CheckpointReader(checkpoint.path), 0.0
    with progress.stage("Running all experts", total=dense.num_layers, unit="layer") as task, torch.no_grad():
        for layer in range(dense.num_layers):
            tensors = read_factored_ffn(reader, layer)
            x_TD = torch.randn(64, dense.hidden_size, generator=torch.Generator().manual_seed(layer))
            whole = unslice_ffn(tensors, checkpoint.spec.shape)
            error = identity_error(dense, checkpoint.spec, layer, whole, tensors, x_TD)
            if not error <= IDENTITY_TOLERANCE[tensors["down"].dtype]:
                raise IntegrityError(f"layer {layer}: all experts on differ from the dense layer by {error:.2e}")
            worst = max(worst, error)
            task.advance()
    return worst


@dataclass(frozen=True)
class Plugins:
    """What can be chosen by name."""

    strategies: list[StrategyInfo]
    aliases: dict[str, str]
    """Short name of a model -> what it stands for."""


def list_plugins() -> Plugins:
    """Every installed strategy, broken ones with their fault, and the model aliases."""
    return Plugins(available(), dict(ALIASES))


@dataclass(frozen=True)
class Diagnosis:
    """What this machine has."""

    factorctl: str
    python: str
    platform: str
    libraries: dict[str, str]
    cpu: str
    cores: int
    memory_bytes: int
    memory_available_bytes: int
    disk_free_bytes: int
    cuda_devices: list[str]
    bf16_on_cpu: bool
    no_kernel: str | None
    """Why the compiled CPU kernel does not run; None where it does."""
    hub: str
    cache: str


def diagnose(workspace: Path) -> Diagnosis:
    """Versions, devices, free disk and memory, and whether the hub answers."""
    existing = next(path for path in (workspace.absolute(), *workspace.absolute().parents) if path.exists())
    return Diagnosis(
        factorctl=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        libraries=library_versions(),
        cpu=processor_name(),
        cores=psutil.cpu_count(logical=True) or 1,
        memory_bytes=psutil.virtual_memory().total,
        memory_available_bytes=available_memory(),
        disk_free_bytes=shutil.disk_usage(existing).free,
        cuda_devices=[torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        bf16_on_cpu=has_fast_bfloat16(),
        no_kernel=reason_without(),
        hub=_hub_state(),
        cache=str(cache_directory()),
    )


def _hub_state() -> str:
    """'reachable', or why not."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]  # of httpx or httpx2

    try:
        HfApi().model_info("hf-internal-testing/tiny-random-LlamaForCausalLM", timeout=5)
    except (TransportError, OSError, RuntimeError) as error:
        return f"not reachable ({type(error).__name__}): the model `demo` and local directories work without it"
    return "reachable"
