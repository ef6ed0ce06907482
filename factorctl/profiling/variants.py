"""The models that a factored model is timed against, all in one process, sharing every weight that they can.

model:  the factored model as it is used.
dense:  the same modules with all experts on: same runtime, same GEMMs, `down` in the layout that is best for it. The
        only base of a speed-up.
narrow: a dense model that is as wide as the active neurons, F*K/N without shared ones: what routing that costs
        nothing would reach.
stock:  transformers' own model, its FFNs three linear layers: what users run today.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Literal, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from factorctl.config.shape import FactorShape
from factorctl.contracts import DenseFFN
from factorctl.ffn.dense import dense_output
from factorctl.ffn.layer import FactoredFFN
from factorctl.ffn.slicing import stored_ffn
from factorctl.models.building import decoder_layers, factored_ffns
from factorctl.models.linears import use_stock_linears

VariantName = Literal["model", "dense", "narrow", "stock"]
ModuleT = TypeVar("ModuleT", bound=nn.Module)


class StockFFN(nn.Module):
    """The whole dense FFN as transformers computes it: three linear layers, weights copied."""

    def __init__(self, ffn: FactoredFFN) -> None:
        super().__init__()
        self.dense, self.activation = dense_part(ffn, ffn.shape.num_experts), ffn.activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return dense_output(self.dense, self.activation, x)


def dense_part(ffn: FactoredFFN, experts: int) -> DenseFFN:
    """The shared neurons and the first `experts` experts as a dense FFN, `down` contiguous."""
    tensors = {name: parameter.detach() for name, parameter in ffn.named_parameters()}
    dense = stored_ffn(tensors, ffn.shape, experts)
    return replace(dense, down_DF=dense.down_DF.contiguous())


def with_all_experts(ffn: FactoredFFN, down_DF: torch.Tensor) -> FactoredFFN:
    """The dense FFN in the factored one's runtime, over the same weights but for `down`, given row after row."""
    dense = _sharing_copy(ffn)
    dense.top_k, dense.path = ffn.shape.num_experts, "auto"
    dense.down = _frozen(down_DF)
    return dense


def dense_as_wide_as(ffn: FactoredFFN, experts: int) -> FactoredFFN:
    """A dense FFN of the shared neurons and the first experts, in the factored one's runtime, weights copied."""
    dense = dense_part(ffn, experts)
    narrow = FactoredFFN(
        FactorShape(1, 1, dense.intermediate_size, 0),
        ffn.hidden_size,
        ffn.activation_name,
        gate_up_bias=dense.gate_bias_F is not None,
        device="meta",
    )
    narrow.gate_up, narrow.down = _frozen(torch.cat([dense.gate_FD, dense.up_FD])[None]), _frozen(dense.down_DF)
    narrow.router = _frozen(ffn.router[:1].detach())
    if dense.gate_bias_F is not None and dense.up_bias_F is not None:
        narrow.gate_up_bias = _frozen(torch.cat([dense.gate_bias_F, dense.up_bias_F])[None])
    narrow.down_bias = ffn.down_bias
    return narrow


def _frozen(weight: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


def make_dense(model: PreTrainedModel) -> PreTrainedModel:
    """The `dense` anchor alone, for where speed is all that is asked."""
    dense = _sharing_copy(model)
    for block, ffn in zip(decoder_layers(dense), factored_ffns(model), strict=True):
        block.mlp = with_all_experts(ffn, ffn.down.detach().contiguous())
    return dense


def make_variants(model: PreTrainedModel) -> dict[VariantName, PreTrainedModel]:
    """The model and its anchors; attention, embeddings and head are the same tensors in all four."""
    dense, narrow, stock = _sharing_copy(model), _sharing_copy(model), _sharing_copy(model)
    ffns = list(factored_ffns(model))
    anchors = zip(decoder_layers(dense), decoder_layers(narrow), decoder_layers(stock), ffns, strict=True)
    for dense_block, narrow_block, stock_block, ffn in anchors:
        narrow_block.mlp, stock_block.mlp = dense_as_wide_as(ffn, ffn.top_k), StockFFN(ffn)
        dense_block.mlp = with_all_experts(ffn, stock_block.mlp.dense.down_DF)
    use_stock_linears(stock)
    return {"model": model, "dense": dense, "narrow": narrow, "stock": stock}


def _sharing_copy(module: ModuleT) -> ModuleT:
    """Another module tree over the same parameters and buffers."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared)
