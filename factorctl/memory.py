"""How much memory a process takes before its work begins, has taken, may still take, and what will not fit."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from factorctl.errors import ResourceError

if TYPE_CHECKING:
    import torch

PROCESS_BYTES = 700_000_000
"""Resident size of the interpreter with torch and transformers loaded, before any weight."""
CGROUP = Path("/sys/fs/cgroup")


def available_memory(cgroup: Path = CGROUP) -> int:
    """Bytes that can be taken without swapping, within the limit of the control group (v2) if there is one.

    File pages that the group could drop count as available, as they do for the whole machine.
    """
    machine = int(psutil.virtual_memory().available)
    limit, used = _number(cgroup / "memory.max"), _number(cgroup / "memory.current")
    if limit is None or used is None:
        return machine
    return max(0, min(machine, limit - used + _droppable(cgroup / "memory.stat")))


def free_memory(device: torch.device) -> int:
    """Bytes that `device` can still give, those included that torch holds in reserve."""
    if device.type != "cuda":
        return available_memory()
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def peak_memory(device: torch.device | None = None) -> int:
    """Most bytes in use so far: by tensors on a CUDA `device`, else the largest resident size of the process."""
    if device is not None and device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes where Linux counts kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def require_memory(needed: int, available: int, *, hint: str, purpose: str = "") -> None:
    """Refuse before the work starts what would not fit.

    Raises:
        ResourceError: with both numbers.
    """
    if needed > available:
        raise ResourceError(
            f"about {needed / 1e9:.1f} GB of memory are needed{purpose}; {available / 1e9:.1f} GB are available", hint
        )


def _number(file: Path) -> int | None:
    """The number in a control file; None where there is no file or no limit ("max")."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _droppable(stat: Path) -> int:
    try:
        words = stat.read_text().split()
    except OSError:
        return 0
    values = dict(zip(words[::2], words[1::2], strict=False))
    return int(values.get("inactive_file", 0))
