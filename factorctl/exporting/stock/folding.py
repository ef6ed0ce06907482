"""From a factored FFN to what stock engines compute: softmax over the chosen experts, nothing multiplied after it.

    native:  y = FFN_shared(x) + s * sum_{e in C} p_e FFN_e(x),  s = a*K
    stock:   y = [FFN_shared(x)] + sum_{e in C} p_e FFN'_e(x)

The scale goes into the experts' down-projections, FFN'_e = s * FFN_e; a power of two changes no mantissa bit.
At K = N native gates are uniform, so the router becomes zero (softmax gives 1/N) and s = N.
Gate `hard` at K = 1 is the softmax over one logit. At K > 1 the router is multiplied by 2^-m: the order of the logits
stays, their softmax tends to 1/K.
Neurons of zeros, which add nothing, fill experts up to sizes that engines like, and a shared MLP that must be there.

T tokens, D hidden_size, N num_experts, H expert_size, S shared_size, K top_k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from factorctl.exporting.stock.padding import SharedPlace, StockSizes, padded, sizes_of
from factorctl.ffn.slicing import FactoredTensors, shared_ffn
from factorctl.ffn.spec import FactoredSpec


@dataclass(frozen=True)
class StockFFN:
    """One layer's experts, in the dtype of the export."""

    gate_NHD: torch.Tensor
    up_NHD: torch.Tensor
    down_NDH: torch.Tensor
    router_ND: torch.Tensor
    shared_gate_SD: torch.Tensor | None = None
    shared_up_SD: torch.Tensor | None = None
    shared_down_DS: torch.Tensor | None = None


@dataclass(frozen=True)
class Folding:
    """How the FFNs of one checkpoint are turned into stock ones."""

    spec: FactoredSpec
    shared: SharedPlace
    dtype: torch.dtype | None = None
    """None keeps each tensor's own."""
    router_shifts: tuple[int, ...] = ()
    """Per layer the m of 2^-m, where gate `hard` or a sigmoid needs it."""
    padded_sizes: StockSizes | None = None
    """None adds no neurons."""

    @property
    def sizes(self) -> StockSizes:
        """Neurons of the export's experts and shared MLP."""
        return self.padded_sizes or sizes_of(self.spec.shape, self.shared)

    def stock_ffn(self, layer: int, tensors: FactoredTensors) -> StockFFN:
        """The stock form of one layer; works on meta tensors as well, which is how sizes are planned."""
        shape = self.spec.shape
        gate_NHD, up_NHD = tensors["gate_up"].split(shape.expert_size, dim=1)
        ffn = StockFFN(
            self.cast(gate_NHD),
            self.cast(up_NHD),
            scaled(routed_down(tensors, self.spec), folded_scale(self.spec, layer), self._dtype_of(tensors["down"])),
            self.router(layer, tensors["router"]),
        )
        return self._padded(self._with_shared(ffn, tensors) if shape.shared_size else ffn)

    def cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.dtype is None else tensor.to(self.dtype)

    def router(self, layer: int, router_ND: torch.Tensor) -> torch.Tensor:
        if self.spec.shape.top_k == self.spec.shape.num_experts:
            return torch.zeros_like(self.cast(router_ND))
        if not self.router_shifts:
            return self.cast(router_ND)
        return scaled(router_ND, 2.0 ** -self.router_shifts[layer], self._dtype_of(router_ND))

    def _dtype_of(self, tensor: torch.Tensor) -> torch.dtype:
        return tensor.dtype if self.dtype is None else self.dtype

    def _with_shared(self, ffn: StockFFN, tensors: FactoredTensors) -> StockFFN:
        shared = shared_ffn(tensors, self.spec.shape)
        gate_SD, up_SD, down_DS = self.cast(shared.gate_FD), self.cast(shared.up_FD), self.cast(shared.down_DF)
        if self.shared == "copied":
            n = self.spec.shape.num_experts
            return StockFFN(
                torch.cat([gate_SD.expand(n, -1, -1), ffn.gate_NHD], dim=1),
                torch.cat([up_SD.expand(n, -1, -1), ffn.up_NHD], dim=1),
                torch.cat([down_DS.expand(n, -1, -1), ffn.down_NDH], dim=2),
                ffn.router_ND,
            )
        if self.shared == "gated":
            down_DS = scaled(shared.down_DF, 2.0, self._dtype_of(shared.down_DF))
        return StockFFN(ffn.gate_NHD, ffn.up_NHD, ffn.down_NDH, ffn.router_ND, gate_SD, up_SD, down_DS)

    def _padded(self, ffn: StockFFN) -> StockFFN:
        """Experts and shared MLP with neurons of zeros up to `sizes`; a shared MLP of zeros where there was none."""
        expert, shared = self.sizes.expert, self.sizes.shared
        shared_gate, shared_up, shared_down = ffn.shared_gate_SD, ffn.shared_up_SD, ffn.shared_down_DS
        if shared and shared_gate is None:
            width = ffn.router_ND.shape[1]
            shared_gate, shared_up = ffn.gate_NHD.new_zeros(0, width), ffn.up_NHD.new_zeros(0, width)
            shared_down = ffn.down_NDH.new_zeros(width, 0)
        return StockFFN(
            padded(ffn.gate_NHD, expert, dim=1),
            padded(ffn.up_NHD, expert, dim=1),
            padded(ffn.down_NDH, expert, dim=2),
            ffn.router_ND,
            None if shared_gate is None else padded(shared_gate, shared, dim=0),
            None if shared_up is None else padded(shared_up, shared, dim=0),
            None if shared_down is None else padded(shared_down, shared, dim=1),
        )


def folded_scale(spec: FactoredSpec, layer: int) -> float:
    """s = a*K, what the experts' down-projections are multiplied by."""
    return spec.scale_a(layer) * spec.shape.top_k


def routed_down(tensors: FactoredTensors, spec: FactoredSpec) -> torch.Tensor:
    """The experts' down-projections [N, D, H], a view of `down` [D, F]."""
    shape, down_DF = spec.shape, tensors["down"]
    routed_DR = down_DF[:, shape.shared_size :]
    return routed_DR.reshape(-1, shape.num_experts, shape.expert_size).transpose(0, 1)


def scaled(tensor: torch.Tensor, factor: float, dtype: torch.dtype) -> torch.Tensor:
    """tensor * factor, computed wide and rounded once to `dtype`."""
    wide = torch.float64 if torch.float64 in (tensor.dtype, dtype) else torch.float32
    return (tensor.to(wide) * factor).to(dtype)


def is_power_of_two(value: float) -> bool:
    return value > 0 and math.frexp(value)[0] == 0.5


def scale_rounding(spec: FactoredSpec, layer: int, tensors: FactoredTensors, dtype: torch.dtype | None) -> float:
    """Relative rms error of the stored s * W_down against the exact product; 0.0 where no bit was lost."""
    exact_NDH = routed_down(tensors, spec).double() * folded_scale(spec, layer)
    stored_NDH = scaled(routed_down(tensors, spec), folded_scale(spec, layer), dtype or tensors["down"].dtype).double()
    return float((stored_NDH - exact_NDH).norm() / exact_NDH.norm().clamp_min(1e-300))
