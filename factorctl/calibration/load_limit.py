"""Routers that spread tokens more evenly: an expert that too many choose is given a price.

An expert's load is the share of the tokens that choose it, K/N when even. Whoever serves a batch with its experts on
several devices waits for the busiest one. Lowering the logits of busy experts by a price λ_e each moves just enough
tokens to their next choice. A router is linear and has no bias to carry a price; but normalised inputs lie on one side
of a hyperplane, so that some u has <u, x> near 1 for all of them, and  W' = W - λ u^T  is a linear router again.

T tokens, D hidden_size, N num_experts.
"""

from __future__ import annotations

import torch

from factorctl.ffn.labels import expert_counts

ROUNDS = 200
AIM = 0.97
"""Part of the limit that prices aim at, so that steps about it end within."""
FIRST_STEP = 0.5
"""Of the prices, in units of the logits' spread for a load of twice the limit; later steps are smaller."""


def with_prices(
    router_ND: torch.Tensor, unit_D: torch.Tensor, x_TD: torch.Tensor, *, top_k: int, limit: float, spread: float
) -> torch.Tensor:
    """The router with prices under which its largest load on `x` is least, or within the limit.

    Args:
        unit_D: u of the least squares problem <u, x> = 1.
        limit: the largest load allowed, in even shares: 1 is even, N/K no limit.
        spread: of the logits, the unit of the prices.
    """
    logits_TN, unit_T1 = x_TD @ router_ND.T, (x_TD @ unit_D).unsqueeze(1)
    even = top_k * len(x_TD) / len(router_ND)
    price_N = torch.zeros(len(router_ND), device=x_TD.device)
    best_N, best_load = price_N, float("inf")
    for turn in range(ROUNDS):
        chosen_TK = (logits_TN - unit_T1 * price_N).topk(top_k, dim=1).indices
        load_N = expert_counts(chosen_TK, len(router_ND)) / even
        if float(load_N.max()) < best_load:
            best_N, best_load = price_N, float(load_N.max())
        if best_load <= limit:
            break
        step = FIRST_STEP * spread / (1 + turn / 10)
        price_N = (price_N + step * (load_N.clamp_min(0.1) / (AIM * limit)).log2()).clamp_min(0)
    return router_ND - best_N.unsqueeze(1) * unit_D
