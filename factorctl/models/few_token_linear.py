"""Matrix products of few tokens on a CPU, shared out over its cores.

MKL's float32 product of few rows keeps one core busy and leaves the others idle: a layer that waits for memory then
takes twice as long as it need. Cut into bands of rows, the weight goes through a batched product, a band to each core.
On 2 cores of a Zen 5 server that takes 0.52 of `F.linear`'s time at 1 token, 0.4 to 0.7 at 16 and 0.65 to 0.9 at 64.
oneDNN's bfloat16 product uses all cores by itself and stays as it is.

The dense model runs on the same products as the factored one, so that no speed-up comes from here.

T tokens, I inputs, O outputs, B bands.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

MAX_TOKENS = 128
MIN_WEIGHTS = 1 << 16
"""A smaller weight fits into a core's cache, and one core is done with it before a second has begun."""
BANDS_PER_THREAD = (4, 2, 1)
"""Preferred first; the number of bands has to divide the outputs."""


def linear(x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear(x, weight_OI, bias_O)` for x of [..., I]."""
    bands = 1 if torch.compiler.is_compiling() else bands_for(x, weight_OI)
    if bands == 1:
        return F.linear(x, weight_OI, bias_O)
    return in_bands(x, weight_OI, bias_O, bands)


def bands_for(x: torch.Tensor, weight_OI: torch.Tensor) -> int:
    """How many bands of rows the weight is cut into; 1 where that would win nothing, and where gradients flow."""
    outputs, inputs = weight_OI.shape
    if (
        weight_OI.dtype != torch.float32
        or not weight_OI.is_cpu
        or not inputs <= x.numel() <= MAX_TOKENS * inputs
        or outputs * inputs < MIN_WEIGHTS
        or (weight_OI.requires_grad and torch.is_grad_enabled())
        or torch.is_autocast_enabled("cpu")
    ):
        return 1
    threads = torch.get_num_threads()
    if threads == 1:
        return 1
    return next((threads * each for each in BANDS_PER_THREAD if outputs % (threads * each) == 0), 1)


def in_bands(x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, bands: int) -> torch.Tensor:
    """The product in `bands` bands of the weight's rows; they are views, nothing is copied but the result."""
    x_TI = x.reshape(-1, x.shape[-1])
    weight_BIO = weight_OI.unflatten(0, (bands, -1)).transpose(1, 2)
    y_BTO = torch.bmm(x_TI.expand(bands, -1, -1), weight_BIO)
    y = y_BTO.transpose(0, 1).reshape(*x.shape[:-1], -1)
    return y if bias_O is None else y + bias_O


class FewTokenLinear(nn.Linear):
    """`nn.Linear` by `linear`: the same parameters under the same names."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear(input, self.weight, self.bias)


def use_few_token_linears(model: nn.Module) -> None:
    """Turn every plain `nn.Linear` of a model (attention's projections, the head) into a `FewTokenLinear`."""
    _exchange(model, nn.Linear, FewTokenLinear)


def use_stock_linears(model: nn.Module) -> None:
    """The way back."""
    _exchange(model, FewTokenLinear, nn.Linear)


def _exchange(model: nn.Module, old: type[nn.Linear], new: type[nn.Linear]) -> None:
    for module in model.modules():
        if type(module) is old:
            module.__class__ = new
