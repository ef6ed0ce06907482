"""Tensor names of a stock export: the per-expert names of transformers 4 where vLLM and llama.cpp read those.

Quantised experts have the fused names of transformers 5, under which it holds them.

A checkpoint is written in units: unit 0 holds embeddings, final norm and head; unit i + 1 holds decoder layer i.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from factorctl.exporting.features import Features, features_of
from factorctl.exporting.stock.architectures import GLM4, HYBRID, MIXTRAL, QWEN2, Architecture
from factorctl.exporting.stock.folding import Folding, StockFFN
from factorctl.ffn.slicing import FactoredTensors
from factorctl.models.families import DenseModel, ReadTensor, ffn_prefix, layer_prefix

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
    if arch.biases == "none" or (features.biases == "none" and arch is not QWEN2):
        return {}
    letters = "qkvo" if arch is HYBRID else "qkv"
    stems = [f"{layer_prefix(layer)}self_attn.{letter}_proj" for letter in letters]
    return {
        f"{stem}.bias": around[f"{stem}.weight"].new_zeros(around[f"{stem}.weight"].shape[0])
        for stem in stems
        if f"{stem}.bias" not in around
    }


def ffn_tensors(ffn: StockFFN, arch: Architecture, layer: int) -> Tensors:
    """The FFN of one layer under the names of `arch`."""
    if arch.is_granite:
        return _granite(ffn, layer_prefix(layer))
    if arch is MIXTRAL:
        return _per_expert(ffn, f"{layer_prefix(layer)}block_sparse_moe.", gate="w1", up="w3", down="w2")
    prefix = f"{ffn_prefix(layer)}."
    tensors = _per_expert(ffn, prefix, gate="gate_proj", up="up_proj", down="down_proj")
    return tensors | _beside_experts(ffn, arch, prefix)


def fused_ffn_tensors(ffn: StockFFN, arch: Architecture, layer: int) -> Tensors:
    """The FFN of one layer under the names that transformers 5 gives its parameters in memory."""
    block = f"{layer_prefix(layer)}block_sparse_moe." if arch.is_granite else f"{ffn_prefix(layer)}."
    tensors = {
        f"{block}{'router' if arch.is_granite else 'gate'}.weight": ffn.router_ND,
        f"{block}experts.gate_up_proj": torch.cat([ffn.gate_NHD, ffn.up_NHD], dim=1),
        f"{block}experts.down_proj": ffn.down_NDH,
    }
    return tensors | (
        _granite_shared(ffn, layer_prefix(layer)) if arch.is_granite else _beside_experts(ffn, arch, block)
    )


def _beside_experts(ffn: StockFFN, arch: Architecture, prefix: str) -> Tensors:
    """The shared expert and what belongs to the gates, in the architectures whose FFN is called `mlp`."""
    if arch is QWEN2:  # a sigmoid gate of zero weights, which is 1/2; `folding` doubled the down-projection
        gate = {f"{prefix}shared_expert_gate.weight": torch.zeros_like(ffn.router_ND[:1])}
        return gate | _shared_expert(ffn, f"{prefix}shared_expert.")
    if arch is GLM4:
        bias = {f"{prefix}gate.e_score_correction_bias": torch.zeros_like(ffn.router_ND[:, 0], dtype=torch.float32)}
        return bias | _shared_expert(ffn, f"{prefix}shared_experts.")
    return {}


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
    gate_SD, up_SD, down_DS = _shared(ffn)
    return {
        f"{prefix}shared_mlp.input_linear.weight": torch.cat([gate_SD, up_SD]),
        f"{prefix}shared_mlp.output_linear.weight": down_DS,
    }


def _shared_expert(ffn: StockFFN, prefix: str) -> Tensors:
    names = [f"{prefix}{stem}.weight" for stem in ("gate_proj", "up_proj", "down_proj")]
    return dict(zip(names, _shared(ffn), strict=True))


def _shared(ffn: StockFFN) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gate, up and down of the shared MLP, which `folding` made where nothing was shared."""
    assert ffn.shared_gate_SD is not None
    assert ffn.shared_up_SD is not None
    assert ffn.shared_down_DS is not None
    return ffn.shared_gate_SD, ffn.shared_up_SD, ffn.shared_down_DS
