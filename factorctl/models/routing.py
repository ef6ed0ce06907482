"""From router logits to the experts of each token and the weights of their outputs.

T tokens, N num_experts, K top_k. The factored FFN adds `s * sum_{e in C} p_e FFN_e(x)` with s = a*K:
`softmax` takes p as the softmax of the logits over the chosen set C (what stock MoE engines compute);
`hard` counts every chosen expert fully, that is p = 1/K, so that s*p = a (FactorLLM, arXiv 2408.11855).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from factorctl.config import Gate


class Routing(NamedTuple):
    """Which experts each token uses, and what each output is multiplied by (s*p_e)."""

    ids_TK: torch.Tensor
    weights_TK: torch.Tensor


def route(logits_TN: torch.Tensor, *, top_k: int, gate: Gate, scale_a: float) -> Routing:
    """Choose the K experts with the largest logits; weights are float32 and hold the scale a*K already."""
    top_TK, ids_TK = torch.topk(logits_TN, top_k, dim=-1)
    return Routing(ids_TK, gate_weights(top_TK, gate=gate, scale_a=scale_a))


def gate_weights(chosen_TK: torch.Tensor, *, gate: Gate, scale_a: float) -> torch.Tensor:
    """s*p_e for the logits of the chosen experts, float32 [T, K]."""
    if gate == "hard":
        return torch.full_like(chosen_TK, scale_a, dtype=torch.float32)
    return torch.softmax(chosen_TK.float(), dim=-1) * (scale_a * chosen_TK.shape[-1])


def scatter_weights(routing: Routing, num_experts: int) -> torch.Tensor:
    """The weights as a dense [T, N] matrix, zero for experts that were not chosen."""
    weights_TN = routing.weights_TK.new_zeros(routing.ids_TK.shape[0], num_experts)
    return weights_TN.scatter(1, routing.ids_TK, routing.weights_TK)
