"""Ways to compute the routed part of a factored FFN. All give the same function; they differ in what they touch.

T tokens, D hidden_size, N num_experts, H expert_size, K top_k, G = 2H rows of a gate|up pair.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F

from factorctl.models.routing import Routing, scatter_weights

Activation = Callable[[torch.Tensor], torch.Tensor]


class ExpertWeights(NamedTuple):
    """The routed experts' weights as views into one expert-contiguous copy."""

    gate_up_NGD: torch.Tensor
    down_DR: torch.Tensor
    """Routed columns of the down-projection, R = N*H; its rows keep the stride of the whole matrix."""
    gate_up_bias_NG: torch.Tensor | None
    activation: Activation

    @property
    def num_experts(self) -> int:
        return self.gate_up_NGD.shape[0]

    @property
    def expert_size(self) -> int:
        return self.gate_up_NGD.shape[1] // 2


def hidden_of_all(x_TD: torch.Tensor, experts: ExpertWeights) -> torch.Tensor:
    """act(gate x) * (up x) of every routed neuron, [T, N, H]: one GEMM over all experts."""
    bias = experts.gate_up_bias_NG
    flat_TR = F.linear(x_TD, experts.gate_up_NGD.flatten(0, 1), None if bias is None else bias.flatten())
    gate_TNH, up_TNH = flat_TR.view(-1, experts.num_experts, 2, experts.expert_size).unbind(2)
    return experts.activation(gate_TNH) * up_TNH


def masked(x_TD: torch.Tensor, experts: ExpertWeights, routing: Routing) -> torch.Tensor:
    """Dense GEMMs with the neurons of unchosen experts set to zero: exact, free of host synchronisation.

    Executes the dense FLOPs whatever K is: the floor of every other path and their oracle.
    """
    weights_TN = scatter_weights(routing, experts.num_experts).to(x_TD.dtype)
    hidden_TNH = hidden_of_all(x_TD, experts) * weights_TN.unsqueeze(-1)
    return F.linear(hidden_TNH.flatten(1), experts.down_DR)


def loop(x_TD: torch.Tensor, experts: ExpertWeights, routing: Routing) -> torch.Tensor:
    """One small FFN after another over the tokens that chose it. Reads the routing on the host: for CPUs."""
    y_TD = torch.zeros_like(x_TD)
    gate_ups, downs = experts.gate_up_NGD.unbind(0), torch.split(experts.down_DR, experts.expert_size, dim=1)
    for expert in torch.unique(routing.ids_TK).tolist():
        token, rank = torch.nonzero(routing.ids_TK == expert, as_tuple=True)
        bias = None if experts.gate_up_bias_NG is None else experts.gate_up_bias_NG[expert]
        gate, up = F.linear(x_TD[token], gate_ups[expert], bias).chunk(2, dim=-1)
        hidden = experts.activation(gate) * up * routing.weights_TK[token, rank, None].to(x_TD.dtype)
        y_TD = y_TD.index_add(0, token, F.linear(hidden, downs[expert]))
    return y_TD
