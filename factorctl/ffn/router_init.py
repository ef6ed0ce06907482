"""A router before anything was learned, as in FactorLLM: small random values, seeded per layer."""

from __future__ import annotations

import torch

ROUTER_STD = 0.02


def random_router(num_experts: int, hidden_size: int, *, seed: int, layer: int) -> torch.Tensor:
    """[N, D] float32, normal with standard deviation 0.02; the same for the same seed and layer."""
    generator = torch.Generator().manual_seed(seed * 100_003 + layer)
    return torch.randn(num_experts, hidden_size, generator=generator) * ROUTER_STD
