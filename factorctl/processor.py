"""What Linux tells of the processor, and what Python knows where it does not."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def processor_name() -> str:
    """The processor's marketing name."""
    names = _described("model name")
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def usable_cores() -> int:
    """Logical cores that this process may run on: of a container or a batch system often a part of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def instruction_sets() -> str:
    """The processor and what it can do: what a compiler for this very machine looks at."""
    described = sorted(set(_described("model name", "flags", "Features", "CPU part"))) or [platform.processor()]
    return "\n".join([platform.machine(), *described])


@functools.cache
def multiplies_tiles() -> bool:
    """Whether the processor has AMX for bfloat16, which oneDNN uses and factorctl's own kernel does not."""
    return "amx_bf16" in instruction_sets().split()


def has_fast_bfloat16(device: torch.device | None = None) -> bool:
    """Whether a CUDA `device`, else the processor, multiplies bfloat16 itself: AVX-512, AMX or ARM's instructions.

    Emulated, products can be 44 to 499 times slower (pytorch #146508).
    """
    if device is not None and device.type == "cuda":
        import torch

        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(instruction_sets().split())


def _described(*fields: str) -> list[str]:
    """Lines of /proc/cpuinfo; none where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return [line for line in lines if line.startswith(fields)]
