"""`factorctl verify`: whether a checkpoint is what its manifest says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from factorctl.checkpoint.manifest import check_files, read_manifest
from factorctl.checkpoint.reader import CheckpointReader
from factorctl.errors import IntegrityError, UsageError
from factorctl.ffn.slicing import unslice_ffn
from factorctl.models.building import empty_factored_model
from factorctl.models.filling import stored_tensors
from factorctl.models.identity import IDENTITY_TOLERANCE, identity_error
from factorctl.models.loading import NativeCheckpoint, open_checkpoint, read_factored_ffn
from factorctl.pipeline.common.recorded_source import holds_dense_values
from factorctl.progress import Progress


@dataclass(frozen=True)
class Verification:
    """What was checked and held."""

    checkpoint: str
    manifest_sha256: str
    files: int
    bytes: int
    tensors: int | None
    identity_error: float | None
    """All experts on against the same neurons as one dense FFN, the worst layer."""
    holds_dense_values: bool
    """Whether those neurons are still the source's: False once a refit or training changed them."""


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
    return Verification(
        str(path),
        manifest.sha256,
        len(manifest.files),
        manifest.total_bytes,
        tensors,
        error,
        holds_dense_values(manifest),
    )


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
