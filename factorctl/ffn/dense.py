"""The dense FFN as plain functions of its weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F
from transformers.activations import ACT2FN

from factorctl.contracts import DenseFFN

Activation = Callable[[torch.Tensor], torch.Tensor]


def dense_hidden(ffn: DenseFFN, activation: str | Activation, x_TD: torch.Tensor) -> torch.Tensor:
    """act(W_gate x + b_gate) * (W_up x + b_up), [T, F]; `activation` by its name in transformers, or itself."""
    act = ACT2FN[activation] if isinstance(activation, str) else activation
    hidden_TF: torch.Tensor = act(F.linear(x_TD, ffn.gate_FD, ffn.gate_bias_F))
    return hidden_TF * F.linear(x_TD, ffn.up_FD, ffn.up_bias_F)


def dense_output(ffn: DenseFFN, activation: str | Activation, x_TD: torch.Tensor) -> torch.Tensor:
    """FFN(x), [T, D]."""
    return F.linear(dense_hidden(ffn, activation, x_TD), ffn.down_DF, ffn.down_bias_D)


def cast_ffn(ffn: DenseFFN, dtype: torch.dtype, device: torch.device | None = None) -> DenseFFN:
    """The same weights in another dtype, on another device."""

    def cast(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to(device=device, dtype=dtype)

    return DenseFFN(
        ffn.gate_FD.to(device=device, dtype=dtype),
        ffn.up_FD.to(device=device, dtype=dtype),
        ffn.down_DF.to(device=device, dtype=dtype),
        cast(ffn.gate_bias_F),
        cast(ffn.up_bias_F),
        cast(ffn.down_bias_D),
    )
