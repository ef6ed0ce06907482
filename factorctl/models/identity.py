"""The proof that a factored FFN still is the dense FFN it was made from."""

from __future__ import annotations

import torch

from factorctl.contracts import DenseFFN
from factorctl.errors import FactorctlError
from factorctl.ffn.dense import cast_ffn, dense_output
from factorctl.ffn.slicing import FactoredTensors, unslice_ffn
from factorctl.ffn.spec import FactoredSpec
from factorctl.models.building import filled_ffn
from factorctl.models.families import DenseModel
from factorctl.processor import has_fast_bfloat16

IDENTITY_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Largest relative error of all experts on against the dense layer, by storage dtype."""


class IdentityError(FactorctlError):
    """A factored layer with all experts on is not the dense layer: nothing may be published."""


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
