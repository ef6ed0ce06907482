"""A choice of experts that learns as if all of them had run: a straight-through estimate over all N.

Forward, the layer gives s * sum over the chosen of p_e o_e. Backward, the selection gets the gradient of the dense
mixture s * sum over all e of P_e o_e with P the softmax of the selection's logits over all experts: the layer computes
R + P - stopgrad(P), R the chosen experts' weights (DenseMixer). So the outputs of experts that a token did not choose
tell its router whether it should have. They get no gradient themselves: their weight is 0.

T tokens, D hidden_size, N num_experts, H expert_size, R = N*H.
"""

from __future__ import annotations

from typing import Any

import torch


class _AsIfAllRan(torch.autograd.Function):
    """y as it is; d loss / d P_te = <d loss / d y_t, o_te>, for which no output o_te is formed."""

    @staticmethod
    def forward(
        ctx: Any, y_TD: torch.Tensor, weight_TN: torch.Tensor, hidden_TNH: torch.Tensor, down_DR: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(weight_TN, hidden_TNH, down_DR)
        return y_TD.view_as(y_TD)

    @staticmethod
    def backward(ctx: Any, gradient_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        weight_TN, hidden_TNH, down_DR = ctx.saved_tensors
        pulled_TNH = (gradient_TD @ down_DR).view_as(hidden_TNH)
        return gradient_TD, (pulled_TNH * hidden_TNH).sum(-1).to(weight_TN.dtype), None, None


def as_if_all_ran(
    y_TD: torch.Tensor, weight_TN: torch.Tensor, hidden_TNH: torch.Tensor, down_DR: torch.Tensor
) -> torch.Tensor:
    """y, with the gradient of sum_e weight_te W_down,e h_te reaching the weights as well.

    Args:
        weight_TN: s * P, which carries the gradient on.
        hidden_TNH: act(gate x) * (up x) of every expert, without gradient.
        down_DR: their down-projections, without gradient.
    """
    y: torch.Tensor = _AsIfAllRan.apply(y_TD, weight_TN, hidden_TNH, down_DR)  # type: ignore[no-untyped-call]
    return y
