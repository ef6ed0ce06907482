"""From `--device` and `--dtype` to what torch computes on and in."""

from __future__ import annotations

from pathlib import Path

import torch

from factorctl.checkpoint.reader import CheckpointReader
from factorctl.config.common import Device, DTypeName
from factorctl.errors import ResourceError
from factorctl.processor import has_fast_bfloat16


def torch_device(device: Device) -> torch.device:
    """`auto` takes CUDA where there is one.

    Raises:
        ResourceError: CUDA was asked for and is not here.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ResourceError(
            "--device cuda was asked for, but torch sees no CUDA device", "run `factorctl doctor`, or use --device cpu"
        )
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def compute_dtype(wanted: DTypeName, checkpoint: Path, device: torch.device, remarks: list[str]) -> torch.dtype:
    """`--dtype`, else the one that the checkpoint is stored in, unless that is bf16 and the device only emulates it."""
    if wanted != "auto":
        return torch_dtype(wanted)
    stored = CheckpointReader(checkpoint).matrix_dtype
    if stored == torch.bfloat16 and not has_fast_bfloat16(device):
        kind = "GPU" if device.type == "cuda" else "CPU"
        remarks.append(f"computed in float32: this {kind} has no bfloat16 arithmetic")
        return torch.float32
    return stored


def storage_dtype(wanted: DTypeName, found: torch.dtype) -> torch.dtype:
    """`--dtype`, else the one in which a tensor is found."""
    return found if wanted == "auto" else torch_dtype(wanted)


def torch_dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype
