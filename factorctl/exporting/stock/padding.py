"""Neurons of zeros in experts and shared MLPs: they add nothing to any output and make sizes that engines like.

An FFN is a sum over its neurons, and a neuron whose three vectors are zero adds zero: padding is exact. It is for
transformers' `grouped_mm`, which takes rows of a multiple of 16 bytes; for block-wise storage types of GGUF, whose
blocks hold 32 weights of a row; and for architectures that demand a shared expert where nothing is shared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from factorctl.config.shape import FactorShape

SharedPlace = Literal["none", "own", "gated", "copied"]
"""Where shared neurons live: nowhere; in an ungated MLP of their own; in one behind a sigmoid gate (held at 1/2 by
zero weights, its down-projection doubled); or copied into every expert, which is exact because the gates sum to one."""
FRIENDLY = 32
"""What `--pad-experts auto` fills up to: a block of GGUF's storage types, and 16 bytes of any dtype."""
LEAST_SHARED = 16
"""Neurons of a shared expert that has to be there and holds nothing: transformers wants its tensors, vLLM has no place
for empty ones. A multiple of usual tensor-parallel degrees."""


@dataclass(frozen=True)
class StockSizes:
    """Neurons of an export's experts and of its shared MLP."""

    expert: int
    shared: int


def sizes_of(shape: FactorShape, shared: SharedPlace) -> StockSizes:
    """The sizes that the split itself gives."""
    if shared == "copied":
        return StockSizes(shape.expert_size + shape.shared_size, 0)
    return StockSizes(shape.expert_size, shape.shared_size)


def filled_up(own: StockSizes, multiple: int) -> StockSizes:
    """`own`, each a multiple of `multiple`."""
    return StockSizes(rounded_up(own.expert, multiple), rounded_up(own.shared, multiple))


def rounded_up(size: int, multiple: int) -> int:
    return math.ceil(size / multiple) * multiple


def padded(tensor: torch.Tensor, size: int, *, dim: int) -> torch.Tensor:
    """`tensor` with zeros behind it along `dim`, `size` long."""
    missing = size - tensor.shape[dim]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)
