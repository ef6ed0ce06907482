"""Tensor names of a stock export: the per-expert names of transformers 4 where vLLM and llama.cpp read those.

Quantised experts have the fused names of transformers 5, under which it holds them.

A checkpoint is written in units: unit 0 holds embeddings, final norm and head; unit i + 1 holds decoder layer i.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from factorctl.exporting.features import Features, features_of
from factorctl.exporting.stock.architecture import Architecture, Tensors
from factorctl.exporting.stock.folding import Folding, StockFFN
from factorctl.ffn.slicing import FactoredTensors
from factorctl.models.families import DenseModel, ReadTensor, ffn_prefix, layer_prefix


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
        features = features_of(self.native.dense)
        around = split_qkv(self.native.around_ffn(layer, read), features)
        around |= absent_biases(around, self.arch, features, layer)
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


def absent_biases(around: Tensors, arch: Architecture, features: Features, layer: int) -> Tensors:
    """Biases of zero for the attention projections that have them in `arch` and not in the source."""
    if arch.biases == "none" or (features.biases == "none" and not arch.always_biased):
        return {}
    letters = "qkvo" if arch.biases == "query-key-value-output" else "qkv"
    stems = [f"{layer_prefix(layer)}self_attn.{letter}_proj" for letter in letters]
    return {
        f"{stem}.bias": around[f"{stem}.weight"].new_zeros(around[f"{stem}.weight"].shape[0])
        for stem in stems
        if f"{stem}.bias" not in around
    }


def ffn_tensors(ffn: StockFFN, arch: Architecture, layer: int) -> Tensors:
    """The FFN of one layer under the names of `arch`."""
    prefix = layer_prefix(layer)
    return arch.experts(ffn, prefix) | arch.beside(ffn, prefix)


def fused_ffn_tensors(ffn: StockFFN, arch: Architecture, layer: int) -> Tensors:
    """The FFN of one layer under the names that transformers 5 gives its parameters in memory."""
    block = f"{layer_prefix(layer)}{arch.block}."
    tensors = {
        f"{block}{arch.router}.weight": ffn.router_ND,
        f"{block}experts.gate_up_proj": torch.cat([ffn.gate_NHD, ffn.up_NHD], dim=1),
        f"{block}experts.down_proj": ffn.down_NDH,
    }
    return tensors | arch.beside(ffn, layer_prefix(layer))
