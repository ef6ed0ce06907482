"""`--to dense`: back to the source's architecture and tensor names.

With experts, every neuron returns to its source position: K = N, the dense model, bit for bit the source where nothing
was trained or refitted. At K = 0 only the shared neurons stay: a narrower dense model of intermediate_size S.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from factorctl.contracts import DenseFFN
from factorctl.exporting.stock.architecture import Tensors
from factorctl.exporting.stock.tensors import NativeUnits, with_head
from factorctl.ffn.slicing import shared_ffn, unslice_ffn
from factorctl.ffn.spec import FactoredSpec
from factorctl.models.families import ReadTensor


@dataclass(frozen=True)
class DenseLayout:
    """The units of a dense checkpoint in the source's architecture."""

    native: NativeUnits
    spec: FactoredSpec
    dtype: torch.dtype | None = None
    untie: bool = False

    @property
    def num_units(self) -> int:
        return self.native.count

    def unit(self, index: int, read: ReadTensor) -> Tensors:
        """Names and tensors of one unit, in the export's dtype."""
        if index == 0:
            return with_head(self._cast(self.native.rest(read)), self.untie)
        layer = index - 1
        tensors, shape = self.native.ffn(layer, read), self.spec.shape
        ffn = shared_ffn(tensors, shape) if shape.top_k == 0 else unslice_ffn(tensors, shape)
        return self._cast(self.native.around_ffn(layer, read) | self._named(ffn, layer))

    def _cast(self, tensors: Tensors) -> Tensors:
        return tensors if self.dtype is None else {name: tensor.to(self.dtype) for name, tensor in tensors.items()}

    def _named(self, ffn: DenseFFN, layer: int) -> Tensors:
        """The FFN's tensors under the family's names, gate and up fused again where the family fuses them."""
        roles = {"gate": ffn.gate_FD, "up": ffn.up_FD, "down": ffn.down_DF}
        roles |= _present(gate_bias=ffn.gate_bias_F, up_bias=ffn.up_bias_F, down_bias=ffn.down_bias_D)
        if self.native.dense.family.fused_gate_up:
            for suffix in ("", "_bias") if "gate_bias" in roles else ("",):
                roles[f"gate_up{suffix}"] = torch.cat([roles.pop(f"gate{suffix}"), roles.pop(f"up{suffix}")])
        names = self.native.dense.ffn_tensor_names(layer)
        return {names[role]: tensor for role, tensor in roles.items()}


def dense_config(raw: Mapping[str, Any], spec: FactoredSpec, *, dtype: str | None, untied: bool) -> dict[str, Any]:
    """The source's config.json, changed only where the export differs from it."""
    config = dict(raw)
    if spec.shape.top_k == 0:
        config["intermediate_size"] = spec.shape.shared_size
    if dtype is not None:
        config |= {key: dtype for key in ("dtype", "torch_dtype") if key in raw} or {"dtype": dtype}
    if untied:
        config["tie_word_embeddings"] = False
    return config


def _present(**tensors: torch.Tensor | None) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}
