"""What the numbers were measured on, and whether it had anything else to do."""

from __future__ import annotations

import os
from dataclasses import dataclass

import psutil
import torch

from factorctl.ffn.kernel import cpu as cpu_kernel
from factorctl.processor import processor_name, usable_cores


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
    no_kernel: str | None = None
    """Why the compiled CPU kernel does not run, where it could."""

    @property
    def busy(self) -> bool:
        """More work than cores: timings tell of the neighbours as much as of the model."""
        return self.load_1min > self.cores

    @property
    def busy_remark(self) -> str:
        """What to say of a busy machine."""
        return f"the machine is busy: load {self.load_1min:g} on {self.cores} cores"

    @property
    def no_kernel_remark(self) -> str:
        """What to say where the kernel does not run."""
        return f"computed by torch alone, without the compiled kernel: {self.no_kernel}"


def look_at_hardware(device: torch.device, dtype: torch.dtype) -> Hardware:
    processor = processor_name()
    return Hardware(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else processor,
        dtype=str(dtype).removeprefix("torch."),
        processor=processor,
        cores=usable_cores(),
        threads=torch.get_num_threads(),
        memory_bytes=psutil.virtual_memory().total,
        load_1min=round(os.getloadavg()[0], 2),
        no_kernel=None if device.type == "cuda" else cpu_kernel.reason_without(),
    )
