"""What the numbers were measured on, and whether it had anything else to do."""

from __future__ import annotations

import os
from dataclasses import dataclass

import psutil
import torch

from factorctl.models.path_choice import processor_name


@dataclass(frozen=True)
class Hardware:
    """The machine at the start of a measurement."""

    device: str
    dtype: str
    processor: str
    cores: int
    threads: int
    memory_bytes: int
    load_1min: float
    """Runnable processes, averaged over the minute before."""

    @property
    def busy(self) -> bool:
        """More work than cores: timings tell of the neighbours as much as of the model."""
        return self.load_1min > self.cores


def look_at_hardware(device: torch.device, dtype: torch.dtype) -> Hardware:
    processor = processor_name()
    return Hardware(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else processor,
        dtype=str(dtype).removeprefix("torch."),
        processor=processor,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory_bytes=psutil.virtual_memory().total,
        load_1min=round(os.getloadavg()[0], 2),
    )


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bf16 products run in hardware; emulated, they can be 44 to 499 times slower (pytorch #146508)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    features = _cpu_flags()
    return bool(features & {"avx512_bf16", "amx_bf16", "bf16"})


def _cpu_flags() -> set[str]:
    """Feature flags of the first processor, where Linux lists them (`flags` on x86, `Features` on Arm)."""
    try:
        with open("/proc/cpuinfo") as stream:
            lines = [line for line in stream if line.lower().startswith(("flags", "features"))]
    except OSError:
        return set()
    return set(lines[0].partition(":")[2].split()) if lines else set()
