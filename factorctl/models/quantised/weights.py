"""Weights that stay quantised in memory: a stock module's parameter, dequantised whenever it is read.

transformers 5 holds the experts of a layer in two parameters, [N, 2H, D] and [N, D, H]. `torch.nn.utils.parametrize`
makes such a parameter a property computed from codes, and the stock forward pass does not notice. What it computes
lives as long as the pass through that layer's experts.

bitsandbytes 0.50 has such a parametrization for 4 bits, `bitsandbytes.nn.parametrize`, and `Linear4bit` for the rest.
Neither is used. On a CPU both compute something else where rows are no multiple of 64 weights, which expert sizes often
are not; `Linear4bit` raises instead where the CPU knows AVX512-BF16. And the scales of the former are no buffers: they
neither follow `model.to(device)` nor count as memory. These do both.

N num_experts, H expert_size, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from factorctl.errors import IntegrityError
from factorctl.models.quantised.storage import BLOCK_SIZE


class FourBit(nn.Module):
    """nf4 codes [bytes, 1] to weights of `shape` and `dtype`."""

    absmax: torch.Tensor

    def __init__(self, absmax: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("absmax", absmax, persistent=False)
        self.shape, self.dtype = shape, dtype

    @torch.no_grad()
    def forward(self, packed: torch.Tensor) -> torch.Tensor:
        from bitsandbytes import functional

        bnb: Any = functional  # which carries hardly any types
        # As one row: bitsandbytes 0.50's CPU kernel begins a block at every row, its quantiser does not.
        flat = torch.Size([self.shape.numel()])
        state = bnb.QuantState(self.absmax, flat, blocksize=BLOCK_SIZE, quant_type="nf4", dtype=self.dtype)
        weight: torch.Tensor = bnb.dequantize_4bit(packed, state)
        return weight.view(self.shape)


class EightBit(nn.Module):
    """int8 rows [N*rows, columns], each with its scale, to weights of `shape` and `dtype`."""

    scales: torch.Tensor

    def __init__(self, scales: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("scales", scales, persistent=False)
        self.shape, self.dtype = shape, dtype

    @torch.no_grad()
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        from bitsandbytes.functional import int8_vectorwise_dequant

        weight: torch.Tensor = int8_vectorwise_dequant(rows, self.scales)
        return weight.to(self.dtype).view(self.shape)


def four_bit(stored: Mapping[str, torch.Tensor], name: str, shape: torch.Size, dtype: torch.dtype) -> FourBit:
    """The parametrization of the 4-bit parameter `name`, from what is stored beside its codes.

    Raises:
        IntegrityError: it is the state of another shape or block size.
    """
    from bitsandbytes.functional import QuantState

    absmax = stored[f"{name}.absmax"]
    try:
        state = QuantState.from_dict(
            {part.removeprefix(f"{name}."): tensor for part, tensor in stored.items()}, device=absmax.device
        )
    except Exception as error:  # JSON in a tensor: any exception is possible
        raise IntegrityError(f"the quantisation state of {name} cannot be read", "make the export again") from error
    if (state.shape, state.blocksize, state.quant_type) != (shape, BLOCK_SIZE, "nf4"):
        raise IntegrityError(
            f"the quantisation state of {name} says {state.quant_type} in blocks of {state.blocksize} for shape "
            f"{tuple(state.shape or ())}; expected is nf4 in blocks of {BLOCK_SIZE} for {tuple(shape)}",
            "make the export again",
        )
    return FourBit(absmax, shape, dtype)


def hold(module: nn.Module, name: str, codes: torch.Tensor, dequantiser: FourBit | EightBit) -> None:
    """Make the parameter `name` of `module` a property that is computed from `codes`."""
    setattr(module, name, nn.Parameter(codes, requires_grad=False))
    parametrize.register_parametrization(module, name, dequantiser, unsafe=True)


def dequantise_once_per_pass(experts: nn.Module) -> None:
    """Keep what was dequantised until the module's forward pass is over; transformers' plain loop reads it N times."""
    open_caches: list[AbstractContextManager[Any]] = []

    def enter(module: nn.Module, inputs: object) -> None:
        cache = parametrize.cached()
        cache.__enter__()
        open_caches.append(cache)

    def leave(module: nn.Module, inputs: object, output: object) -> None:
        if open_caches:  # a pass that failed before `enter` has none
            open_caches.pop().__exit__(None, None, None)

    experts.register_forward_pre_hook(enter)
    experts.register_forward_hook(leave, always_call=True)
