"""Which experts real tokens choose, layer by layer.

T tokens, L layers, N num_experts, K top_k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from factorctl.models.building import factored_ffns
from factorctl.models.hooks import watched


@dataclass(frozen=True)
class LayerLoad:
    """How the tokens of one layer spread over its experts."""

    layer: int
    share: list[float]
    """Per expert, the share of tokens that choose it; sums to K."""
    cv: float
    """Standard deviation of the shares over their mean: 0 when all experts are used alike."""
    max_share: float

    def expected_hits(self, tokens: int) -> float:
        """Experts that at least one of `tokens` independent tokens chooses."""
        return sum(1 - (1 - share) ** tokens for share in self.share)


@dataclass(frozen=True)
class RoutedText:
    """What a prefill over text showed: loads, and the FFN inputs of every layer for further timing."""

    loads: list[LayerLoad]
    inputs_LTD: list[torch.Tensor]


@torch.no_grad()
def route_text(model: PreTrainedModel, ids_BP: torch.Tensor) -> RoutedText:
    """Run `ids_BP` once and look at every layer's routing; empty when K leaves nothing to route."""
    ffns = list(factored_ffns(model))
    inputs: list[torch.Tensor] = []

    def note(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        inputs.append(args[0].flatten(0, -2))

    with watched(ffns, before=note):
        model(ids_BP, use_cache=False, logits_to_keep=1)
    loads = [
        layer_load(layer, ffn.route(x_TD).ids_TK, ffn.shape.num_experts)
        for layer, (ffn, x_TD) in enumerate(zip(ffns, inputs, strict=True))
        if ffn.routes
    ]
    return RoutedText(loads, inputs)


def layer_load(layer: int, ids_TK: torch.Tensor, num_experts: int) -> LayerLoad:
    share_N = torch.bincount(ids_TK.flatten(), minlength=num_experts).double() / ids_TK.shape[0]
    cv = float(share_N.std(unbiased=False) / share_N.mean())
    return LayerLoad(layer, [round(float(share), 6) for share in share_N], cv, float(share_N.max()))


def mean_hits(loads: list[LayerLoad], top_k: int, tokens: int) -> float:
    """Experts hit per layer by `tokens` tokens, from the measured shares; K where nothing is routed."""
    return sum(load.expected_hits(tokens) for load in loads) / len(loads) if loads else float(top_k)
