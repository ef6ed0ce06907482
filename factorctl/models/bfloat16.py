"""Whether a device multiplies bfloat16 itself or only emulates it."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

CPU = torch.device("cpu")


def has_fast_bfloat16(device: torch.device = CPU) -> bool:
    """Whether bf16 products run in hardware; emulated, they can be 44 to 499 times slower (pytorch #146508)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(_cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})


@functools.cache
def _cpu_flags() -> frozenset[str]:
    """Feature flags of the first processor, where Linux lists them (`flags` on x86, `Features` on Arm)."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    listed = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return frozenset(listed.partition(":")[2].split())
