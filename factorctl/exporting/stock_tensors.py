"""Tensor names of a stock export: the per-expert names of transformers 4 where vLLM and llama.cpp read those.

Quantised experts have the fused names of transformers 5, under which it holds them.

A checkpoint is written in units: unit 0 holds embeddings, final norm and head; unit i + 1 holds decoder layer i.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from factorctl.exporting.architectures import GRANITE, MIXTRAL, QWEN2, Architecture
from factorctl.exporting.features import Features, features_of
from factorctl.exporting.folding import Folding, StockFFN
from factorctl.exporting.stock_config import PADDING_SHARED_SIZE
from factorctl.models.families import DenseModel, ReadTensor, ffn_prefix, layer_prefix
from factorctl.models.slicing import FactoredTensors

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class NativeUnits:
    """A native checkpoint read unit by unit; `names` are its tensors."""

    dense: DenseModel
    names: tuple[str, ...]

    @property
    def count(self) -> int:
        return self.dense.num_layers + 1

    def rest(self, read: ReadTensor) -> Tensors:
        """Unit 0: embeddings, final norm, and the head where it is no copy of the embeddings."""
        return {name: read(name) for name in self.names if not name.startswith("model.layers.")}

    def ffn(self, layer: int, read: ReadTensor) -> FactoredTensors:
        """The factored FFN of a layer, by parameter name."""
        prefix = f"{ffn_prefix(layer)}."
        return {name.removeprefix(prefix): read(name) for name in self.names if name.startswith(prefix)}

    def around_ffn(self, layer: int, read: ReadTensor) -> Tensors:
        """Everything else of a layer: attention and norms, under the source's names."""
        prefix, ffn = layer_prefix(layer), f"{ffn_prefix(layer)}."
        names = [name for name in self.names if name.startswith(prefix) and not name.startswith(ffn)]
        return {name: read(name) for name in names}


@dataclass(frozen=True)
class StockLayout:
    """The units of a stock Hugging Face checkpoint."""

    native: NativeUnits
    arch: Architecture
    folding: Folding
    untie: bool = False
    fused: bool = False
    """Whether the experts of a layer are two tensors under the names of transformers 5."""

    @property
    def num_units(self) -> int:
        return self.native.count

    def unit(self, index: int, read: ReadTensor) -> Tensors:
        """Names and tensors of one unit, in the export's dtype."""
        if index == 0:
            return with_head({name: self.folding.cast(t) for name, t in self.native.rest(read).items()}, self.untie)
        layer = index - 1
        around = split_qkv(self.native.around_ffn(layer, read), features_of(self.native.dense))
        tensors = {name: self.folding.cast(tensor) for name, tensor in around.items()}
        ffn = self.folding.stock_ffn(layer, self.native.ffn(layer, read))
        return tensors | (fused_ffn_tensors if self.fused else ffn_tensors)(ffn, self.arch, layer)


def with_head(tensors: Tensors, untie: bool) -> Tensors:
    """Add the embeddings once more as `lm_head.weight` where an engine needs a head of its own."""
    if untie and "lm_head.weight" not in tensors:
        return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    return tensors


def split_qkv(tensors: Tensors, features: Features) -> Tensors:
    """Phi-3's fused `qkv_proj` as three projections; other names pass unchanged."""
    sizes = [heads * features.head_dim for heads in (features.num_heads, features.num_kv_heads, features.num_kv_heads)]
    result: Tensors = {}
    for name, tensor in tensors.items():
        if ".qkv_proj." in name:
            parts = zip("qkv", tensor.split(sizes), strict=True)
            result |= {name.replace("qkv_proj", f"{letter}_proj"): part for letter, part in parts}
        else:
            result[name] = tensor
    return result


def ffn_tensors(ffn: StockFFN, arch: Architecture, layer: int) -> Tensors:
    """The FFN of one layer under the names of `arch`."""
    if arch is GRANITE:
        return _granite(ffn, layer_prefix(layer))
    if arch is MIXTRAL:
        return _per_expert(ffn, f"{layer_prefix(layer)}block_sparse_moe.", gate="w1", up="w3", down="w2")
    tensors = _per_expert(ffn, f"{ffn_prefix(layer)}.", gate="gate_proj", up="up_proj", down="down_proj")
    return tensors | _qwen2_shared(ffn, f"{ffn_prefix(layer)}.") if arch is QWEN2 else tensors


def fused_ffn_tensors(ffn: StockFFN, arch: Architecture, layer: int) -> Tensors:
    """The FFN of one layer under the names that transformers 5 gives its parameters in memory."""
    is_granite = arch is GRANITE
    block = f"{layer_prefix(layer)}block_sparse_moe." if is_granite else f"{ffn_prefix(layer)}."
    tensors = {
        f"{block}{'router' if is_granite else 'gate'}.weight": ffn.router_ND,
        f"{block}experts.gate_up_proj": torch.cat([ffn.gate_NHD, ffn.up_NHD], dim=1),
        f"{block}experts.down_proj": ffn.down_NDH,
    }
    if is_granite:
        return tensors | _granite_shared(ffn, layer_prefix(layer))
    return tensors | _qwen2_shared(ffn, block) if arch is QWEN2 else tensors


def _per_expert(ffn: StockFFN, prefix: str, *, gate: str, up: str, down: str) -> Tensors:
    tensors = {f"{prefix}gate.weight": ffn.router_ND}
    for stem, stacked in ((gate, ffn.gate_NHD), (up, ffn.up_NHD), (down, ffn.down_NDH)):
        tensors |= {f"{prefix}experts.{expert}.{stem}.weight": part for expert, part in enumerate(stacked.unbind())}
    return tensors


def _granite(ffn: StockFFN, prefix: str) -> Tensors:
    return {
        f"{prefix}block_sparse_moe.router.layer.weight": ffn.router_ND,
        f"{prefix}block_sparse_moe.input_linear.weight": torch.cat([ffn.gate_NHD, ffn.up_NHD], dim=1),
        f"{prefix}block_sparse_moe.output_linear.weight": ffn.down_NDH,
        **_granite_shared(ffn, prefix),
    }


def _granite_shared(ffn: StockFFN, prefix: str) -> Tensors:
    assert ffn.shared_gate_SD is not None
    assert ffn.shared_up_SD is not None
    assert ffn.shared_down_DS is not None
    return {
        f"{prefix}shared_mlp.input_linear.weight": torch.cat([ffn.shared_gate_SD, ffn.shared_up_SD]),
        f"{prefix}shared_mlp.output_linear.weight": ffn.shared_down_DS,
    }


def _qwen2_shared(ffn: StockFFN, prefix: str) -> Tensors:
    """The shared expert behind a sigmoid gate of zero weights, which is 1/2; `folding` doubled the down-projection."""
    width = ffn.router_ND.shape[1]
    zeros_SD = ffn.gate_NHD.new_zeros(PADDING_SHARED_SIZE, width)
    return {
        f"{prefix}shared_expert_gate.weight": ffn.gate_NHD.new_zeros(1, width),
        f"{prefix}shared_expert.gate_proj.weight": zeros_SD if ffn.shared_gate_SD is None else ffn.shared_gate_SD,
        f"{prefix}shared_expert.up_proj.weight": zeros_SD.clone() if ffn.shared_up_SD is None else ffn.shared_up_SD,
        f"{prefix}shared_expert.down_proj.weight": zeros_SD.T.clone()
        if ffn.shared_down_DS is None
        else ffn.shared_down_DS,
    }
