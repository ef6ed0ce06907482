"""From `--device` and `--dtype` to what torch computes on and in."""

from __future__ import annotations

import torch

from factorctl.config import Device
from factorctl.errors import ResourceError


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
