"""From router logits to the experts of each token and the weights of their outputs.

T tokens, N num_experts, K top_k. The factored FFN adds `s * sum_{e in C} p_e FFN_e(x)` with s = a*K:
`softmax` takes p as the softmax of the logits over the chosen set C (what stock MoE engines compute);
`hard` counts every chosen expert fully, that is p = 1/K, so that s*p = a (FactorLLM, arXiv 2408.11855).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.compiler import is_compiling

from factorctl.config.shape import Gate

MAX_ARGMAXES = 8
"""Experts per token up to which a compiled graph finds them one after another. UNTIMED: inductor's code was read."""


class Routing(NamedTuple):
    """Which experts each token uses, and what each output is multiplied by (s*p_e)."""

    ids_TK: torch.Tensor
    weights_TK: torch.Tensor


class ExpertGroups(NamedTuple):
    """The T*K (token, expert) pairs, sorted by expert, so that each expert's tokens lie together; P = T*K."""

    order_P: torch.Tensor
    """Position of each pair in the flattened [T, K] routing."""
    token_P: torch.Tensor
    expert_P: torch.Tensor


def route(logits_TN: torch.Tensor, *, top_k: int, gate: Gate, scale_a: float) -> Routing:
    """Choose the K experts with the largest logits; weights are float32 and hold the scale a*K already."""
    top_TK, ids_TK = _largest(logits_TN, top_k) if _fuses(top_k) else torch.topk(logits_TN, top_k, dim=-1)
    return Routing(ids_TK, gate_weights(top_TK, gate=gate, scale_a=scale_a))


def _fuses(top_k: int) -> bool:
    """Whether to spell routing in comparisons and reductions, which inductor fuses into the kernels around them.

    topk and scatter are kernels of their own on a GPU, and launches are what a decoding step of few tokens waits for.
    """
    return is_compiling() and top_k <= MAX_ARGMAXES


def _largest(logits_TN: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """topk by K argmaxes; of equal logits, the lower expert's."""
    experts_N, left_TN, ids = torch.arange(logits_TN.shape[1], device=logits_TN.device), logits_TN, []
    for _ in range(top_k):
        ids.append(left_TN.argmax(dim=-1, keepdim=True))
        left_TN = left_TN.masked_fill(experts_N == ids[-1], -torch.inf)
    ids_TK = torch.cat(ids, dim=-1)
    return logits_TN.gather(1, ids_TK), ids_TK


def gate_weights(chosen_TK: torch.Tensor, *, gate: Gate, scale_a: float) -> torch.Tensor:
    """s*p_e for the logits of the chosen experts, float32 [T, K]."""
    top_k = chosen_TK.shape[-1]
    # Softmax over one logit is the constant 1 with zero gradient: at K = 1 only the graph would differ.
    if gate == "hard" or (top_k == 1 and not chosen_TK.requires_grad):
        return torch.full_like(chosen_TK, scale_a, dtype=torch.float32)
    return torch.softmax(chosen_TK, dim=-1, dtype=torch.float32) * (scale_a * top_k)


def unit_routing(tokens: int, num_experts: int, device: torch.device) -> Routing:
    """K = N: every token uses every expert with weight 1, which is the dense FFN."""
    ids_N = torch.arange(num_experts, device=device)
    return Routing(ids_N.expand(tokens, -1), torch.ones(tokens, num_experts, device=device))


def scatter_weights(routing: Routing, num_experts: int) -> torch.Tensor:
    """The weights as a dense [T, N] matrix, zero for experts that were not chosen."""
    if _fuses(routing.ids_TK.shape[1]):
        chosen_TKN = routing.ids_TK.unsqueeze(-1) == torch.arange(num_experts, device=routing.ids_TK.device)
        return (chosen_TKN * routing.weights_TK.unsqueeze(-1)).sum(1)
    weights_TN = routing.weights_TK.new_zeros(routing.ids_TK.shape[0], num_experts)
    return weights_TN.scatter(1, routing.ids_TK, routing.weights_TK)


def group_by_expert(ids_TK: torch.Tensor) -> ExpertGroups:
    """Sort the pairs by expert; within an expert the tokens keep their order. No host synchronisation."""
    expert_P, order_P = torch.sort(ids_TK.flatten(), stable=True)
    return ExpertGroups(order_P, order_P // ids_TK.shape[1], expert_P)


def logit_spread(logits_TN: torch.Tensor) -> torch.Tensor:
    """How far a typical token's logits lie apart: the median over tokens of their standard deviation.

    The few tokens with massive activations do not count.
    """
    return logits_TN.std(dim=1).median()
