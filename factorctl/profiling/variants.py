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
from typing import Literal, TypeVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from factorctl.config.shape import FactorShape
from factorctl.ffn.layer import FactoredFFN
from factorctl.models.building import decoder_layers, factored_ffns
from factorctl.models.linears import use_stock_linears

VariantName = Literal["model", "dense", "narrow", "stock"]
ModuleT = TypeVar("ModuleT", bound=nn.Module)


class StockFFN(nn.Module):
    """The whole dense FFN as transformers computes it: three linear layers, weights copied."""

    def __init__(self, ffn: FactoredFFN) -> None:
        super().__init__()
        experts = ffn.shape.num_experts
        self.gate_FD, self.up_FD, self.down_DF = dense_weights(ffn, experts)
        biases = dense_biases(ffn, experts)
        self.gate_bias = None if biases is None else biases[0]
        self.up_bias = None if biases is None else biases[1]
        self.down_bias, self.activation = ffn.down_bias, ffn.activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.activation(F.linear(x, self.gate_FD, self.gate_bias))
        return F.linear(gate * F.linear(x, self.up_FD, self.up_bias), self.down_DF, self.down_bias)


def dense_weights(ffn: FactoredFFN, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """gate, up and down of the shared neurons and the first `experts` experts, contiguous."""
    size, width = ffn.shape.expert_size, ffn.hidden_size
    gate_up = ffn.gate_up[:experts].detach().view(experts, 2, size, width)
    gate, up = gate_up[:, 0].reshape(-1, width), gate_up[:, 1].reshape(-1, width)
    if ffn.shared_gate_up is not None:
        shared_gate, shared_up = ffn.shared_gate_up.detach().chunk(2)
        gate, up = torch.cat([shared_gate, gate]), torch.cat([shared_up, up])
    return gate, up, ffn.down.detach()[:, : ffn.shape.shared_size + experts * size].contiguous()


def dense_biases(ffn: FactoredFFN, experts: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """gate and up biases in the order of `dense_weights`; None where the FFN has none."""
    if ffn.gate_up_bias is None:
        return None
    gate, up = (part.flatten() for part in ffn.gate_up_bias[:experts].detach().view(experts, 2, -1).unbind(1))
    if ffn.shared_gate_up_bias is None:
        return gate, up
    shared_gate, shared_up = ffn.shared_gate_up_bias.detach().chunk(2)
    return torch.cat([shared_gate, gate]), torch.cat([shared_up, up])


def with_all_experts(ffn: FactoredFFN, down_DF: torch.Tensor) -> FactoredFFN:
    """The dense FFN in the factored one's runtime, over the same weights but for `down`, given row after row."""
    dense = _sharing_copy(ffn)
    dense.top_k, dense.path = ffn.shape.num_experts, "auto"
    dense.down = _frozen(down_DF)
    return dense


def dense_as_wide_as(ffn: FactoredFFN, experts: int) -> FactoredFFN:
    """A dense FFN of the shared neurons and the first experts, in the factored one's runtime, weights copied."""
    gate_FD, up_FD, down_DF = dense_weights(ffn, experts)
    biases = dense_biases(ffn, experts)
    narrow = FactoredFFN(
        FactorShape(1, 1, down_DF.shape[1], 0),
        ffn.hidden_size,
        ffn.activation_name,
        gate_up_bias=biases is not None,
        device="meta",
    )
    narrow.gate_up, narrow.down = _frozen(torch.cat([gate_FD, up_FD])[None]), _frozen(down_DF)
    narrow.router = _frozen(ffn.router[:1].detach())
    if biases is not None:
        narrow.gate_up_bias = _frozen(torch.cat(biases)[None])
    narrow.down_bias = ffn.down_bias
    return narrow


def _frozen(weight: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


def make_variants(model: PreTrainedModel) -> dict[VariantName, PreTrainedModel]:
    """The model and its anchors; attention, embeddings and head are the same tensors in all four."""
    dense, narrow, stock = _sharing_copy(model), _sharing_copy(model), _sharing_copy(model)
    ffns = list(factored_ffns(model))
    anchors = zip(decoder_layers(dense), decoder_layers(narrow), decoder_layers(stock), ffns, strict=True)
    for dense_block, narrow_block, stock_block, ffn in anchors:
        narrow_block.mlp, stock_block.mlp = dense_as_wide_as(ffn, ffn.top_k), StockFFN(ffn)
        dense_block.mlp = with_all_experts(ffn, stock_block.mlp.down_DF)
    use_stock_linears(stock)
    return {"model": model, "dense": dense, "narrow": narrow, "stock": stock}


def _sharing_copy(module: ModuleT) -> ModuleT:
    """Another module tree over the same parameters and buffers."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared)
