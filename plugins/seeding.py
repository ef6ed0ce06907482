"""One random stream per layer, the same on every run and apart from torch's global state."""

from __future__ import annotations

import hashlib

import torch

from factorctl.contracts import PartitionSpec


def layer_generator(spec: PartitionSpec) -> torch.Generator:
    """A CPU generator that (spec.seed, spec.layer) decides.

    The pair is hashed: with seed + layer, layer 1 of seed 0 would repeat layer 0 of seed 1.
    """
    digest = hashlib.sha256(f"{spec.seed}/{spec.layer}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
