"""Whether a device multiplies bfloat16 itself or only emulates it."""

from __future__ import annotations

import torch

from factorctl.processor import multiplies_bfloat16

CPU = torch.device("cpu")


def has_fast_bfloat16(device: torch.device = CPU) -> bool:
    """Whether bf16 products run in hardware; emulated, they can be 44 to 499 times slower (pytorch #146508)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return multiplies_bfloat16()
