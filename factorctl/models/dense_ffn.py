"""The dense FFN as plain functions of its weights, and the proof that a factored FFN still is that FFN."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from transformers.activations import ACT2FN

from factorctl.contracts import DenseFFN
from factorctl.errors import FactorctlError
from factorctl.ffn.slicing import FactoredTensors, unslice_ffn
from factorctl.ffn.spec import FactoredSpec
from factorctl.models.bfloat16 import has_fast_bfloat16
from factorctl.models.building import filled_ffn
from factorctl.models.families import DenseModel

IDENTITY_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Largest relative error of all experts on against the dense layer, by storage dtype."""


class IdentityError(FactorctlError):
    """A factored layer with all experts on is not the dense layer: nothing may be published."""


def dense_hidden(ffn: DenseFFN, activation: str, x_TD: torch.Tensor) -> torch.Tensor:
    """act(W_gate x + b_gate) * (W_up x + b_up), [T, F]."""
    hidden_TF: torch.Tensor = ACT2FN[activation](F.linear(x_TD, ffn.gate_FD, ffn.gate_bias_F))
    return hidden_TF * F.linear(x_TD, ffn.up_FD, ffn.up_bias_F)


def dense_output(ffn: DenseFFN, activation: str, x_TD: torch.Tensor) -> torch.Tensor:
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


def check_identity(
    dense: DenseModel, spec: FactoredSpec, layer: int, ffn: DenseFFN, tensors: FactoredTensors, x_TD: torch.Tensor
) -> float:
    """Relative error of the factored layer with all experts on against the dense one.

    Computed in the storage dtype where that is bfloat16 and the processor has it, else in float32.
    Also holds every weight of the factored layer, moved back, to be bit for bit the source's.

    Raises:
        IdentityError: a value changed, or the error is above the tolerance of the storage dtype.
    """
    back = unslice_ffn(tensors, spec.shape)
    for name in ("gate_FD", "up_FD", "down_DF", "gate_bias_F", "up_bias_F", "down_bias_D"):
        ours, theirs = getattr(back, name), getattr(ffn, name)
        if theirs is not None and not torch.equal(ours, theirs):
            raise IdentityError(f"layer {layer}: values of {name} changed while they were moved", _REPORT)
    native_bf16 = ffn.gate_FD.dtype == torch.bfloat16 and has_fast_bfloat16()
    dtype = torch.bfloat16 if native_bf16 else torch.float32
    error = identity_error(dense, spec, layer, ffn, tensors, x_TD.to(dtype))
    tolerance = IDENTITY_TOLERANCE[ffn.gate_FD.dtype]
    if not error <= tolerance:
        raise IdentityError(
            f"layer {layer}: all experts on differ from the dense layer by {error:.2e} (allowed: {tolerance:.0e})",
            _REPORT,
        )
    return error


def identity_error(
    dense: DenseModel, spec: FactoredSpec, layer: int, ffn: DenseFFN, tensors: FactoredTensors, x_TD: torch.Tensor
) -> float:
    """Relative error of the factored layer with all experts on against `ffn`, both computed in the dtype of `x`."""
    all_on = spec.with_top_k(spec.shape.num_experts)
    reference_TD = dense_output(cast_ffn(ffn, x_TD.dtype), dense.activation, x_TD).float()
    ours_TD = filled_ffn(dense, all_on, layer, tensors, dtype=x_TD.dtype)(x_TD).float()
    return float((ours_TD - reference_TD).norm() / reference_TD.norm().clamp_min(1e-30))


_REPORT = "nothing was published; this is a fault of factorctl or of the strategy: please report it"
