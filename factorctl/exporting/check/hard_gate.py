"""Routers multiplied by 2^-m: for gate `hard` at K > 1 on stock routers, and so that no sigmoid saturates.

Stock routers take the softmax over all N logits in float32, then the K largest. With logits times 2^-m the gates tend
to 1/K, which is what the hard gate means; but beyond some m float32 no longer tells the probabilities apart, and
another expert is chosen. m is picked per layer on calibration tokens: the largest that keeps every token's selection.

Of K = 1 under sigmoids only the order matters, and float32 loses it where logits are large: sigmoids all become 1.

T tokens, N num_experts, K top_k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

MAX_SHIFT = 24
FP16_MAX_SHIFT = 6
"""float16 holds 2^-24 at the least: a router scaled further would lose bits."""


@dataclass(frozen=True)
class RouterScaling:
    """The shifts m of every layer and how near they come to the hard gate."""

    shifts: tuple[int, ...]
    selection_agreement: float
    """Share of (token, layer) pairs, of tokens that did not choose m, with the same K experts."""
    gate_error: float
    """Relative rms deviation of the chosen gates from 1/K over those pairs."""


def choose_shifts(router_logits: Sequence[torch.Tensor], top_k: int, *, max_shift: int = MAX_SHIFT) -> RouterScaling:
    """Choose m per layer on the even tokens and measure it on the odd ones."""
    shifts = tuple(_largest_safe_shift(logits_TN[::2], top_k, max_shift) for logits_TN in router_logits)
    measured = [
        agreement_and_error(logits_TN[1::2], top_k, m) for logits_TN, m in zip(router_logits, shifts, strict=True)
    ]
    same = torch.cat([agreed_T for agreed_T, _ in measured]).float().mean()
    error = torch.cat([error_T for _, error_T in measured]).mean().sqrt()
    return RouterScaling(shifts, float(same), float(error))


def choose_unsaturated_shifts(router_logits: Sequence[torch.Tensor], *, max_shift: int = MAX_SHIFT) -> RouterScaling:
    """m per layer for K = 1: the least that brings every logit within 1, where sigmoids are nearly straight."""
    largest = [float(logits_TN.abs().max()) for logits_TN in router_logits]
    shifts = tuple(min(max_shift, max(0, math.ceil(math.log2(size)))) if size else 0 for size in largest)
    same = [
        (torch.sigmoid(logits_TN.float() * 2.0**-m).argmax(-1) == logits_TN.argmax(-1)).float().mean()
        for logits_TN, m in zip(router_logits, shifts, strict=True)
    ]
    return RouterScaling(shifts, float(torch.stack(same).mean()), 0.0)


def _largest_safe_shift(logits_TN: torch.Tensor, top_k: int, max_shift: int) -> int:
    """The largest m at which every token keeps its experts; two bits are left as a margin."""
    safe = 0
    for m in range(max_shift + 1):
        agreed_T, _ = agreement_and_error(logits_TN, top_k, m)
        if not bool(agreed_T.all()):
            break
        safe = m
    return max(0, safe - 2)


def agreement_and_error(logits_TN: torch.Tensor, top_k: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(whether a stock router chooses the same experts [T], mean squared relative deviation of its gates [T])."""
    chosen_TK = logits_TN.topk(top_k, dim=-1).indices.sort(dim=-1).values
    gates_TK, ids_TK = torch.softmax(logits_TN * 2.0**-m, dim=-1).topk(top_k, dim=-1)
    gates_TK = gates_TK / gates_TK.sum(-1, keepdim=True)
    return (ids_TK.sort(dim=-1).values == chosen_TK).all(-1), (gates_TK * top_k - 1).square().mean(-1)
