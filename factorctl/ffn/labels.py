"""Which experts the dense teacher would choose, and how far a router agrees: PAR's pseudo-labels (arXiv 2408.11855).

Training learns routers from these labels; evaluation measures routers against them and lets them route (the oracle).

T tokens, D hidden_size, N num_experts, H expert_size, K top_k.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from factorctl.ffn.layer import FactoredFFN
from factorctl.ffn.paths import hidden_of_all

Teacher = Callable[[torch.Tensor], torch.Tensor]
"""The dense FFN of one layer: inputs [T, D] -> outputs [T, D]."""
LABEL_CHUNK_TOKENS = 4096
DEAD_SHARE = 0.01
"""An expert is dead when it gets less than this part of an even share of the tokens."""


def par_distances(
    hidden_TNH: torch.Tensor, down_NDH: torch.Tensor, target_TD: torch.Tensor, share: float
) -> torch.Tensor:
    """||o_e - share*t||^2 - ||share*t||^2 = ||o_e||^2 - 2 share <o_e, t> for every expert, [T, N].

    Args:
        share: what of the target one expert should give; K/N in FactorLLM (arXiv 2408.11855), whose t/(N/K) it is.
    """
    if _wide(down_NDH):
        along_TN, square_TN = along_and_square(hidden_TNH, down_NDH, target_TD)
        return square_TN - 2 * share * along_TN
    hidden_NTH, pulled_NTH, gram_NHH = _factors(hidden_TNH, down_NDH, target_TD)
    return (hidden_NTH * torch.baddbmm(pulled_NTH, hidden_NTH, gram_NHH, beta=-2 * share)).sum(-1).T


def along_and_square(
    hidden_TNH: torch.Tensor, down_NDH: torch.Tensor, target_TD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """<o_e, t> and ||o_e||^2 of every expert, each [T, N], where o_e = W_down,e h_e is what the expert gives.

    Neither it nor [T, N, D] is formed where H <= D: <o_e, t> is h_e on W_down,e^T t, and ||o_e||^2 is h_e^T G_e h_e
    with the Gram matrix G_e = W_down,e^T W_down,e [H, H]. Wider experts take their outputs one by one.
    """
    if _wide(down_NDH):
        outputs = (hidden_TH @ down_DH.T for hidden_TH, down_DH in zip(hidden_TNH.unbind(1), down_NDH, strict=True))
        columns = [((o_TD * target_TD).sum(1), o_TD.square().sum(1)) for o_TD in outputs]
        along_TN, square_TN = (torch.stack(column, dim=1) for column in zip(*columns, strict=True))
        return along_TN, square_TN
    hidden_NTH, pulled_NTH, gram_NHH = _factors(hidden_TNH, down_NDH, target_TD)
    return (hidden_NTH * pulled_NTH).sum(-1).T, (hidden_NTH * (hidden_NTH @ gram_NHH)).sum(-1).T


def _wide(down_NDH: torch.Tensor) -> bool:
    return down_NDH.shape[2] > down_NDH.shape[1]


def _factors(
    hidden_TNH: torch.Tensor, down_NDH: torch.Tensor, target_TD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """h_e, W_down,e^T t and G_e, expert by expert."""
    down_DR = down_NDH.transpose(0, 1).flatten(1)  # a view where it is cut out of a layer's: one product for all
    pulled_NTH = (target_TD @ down_DR).view_as(hidden_TNH).transpose(0, 1)
    return hidden_TNH.transpose(0, 1), pulled_NTH, down_NDH.transpose(1, 2) @ down_NDH


@torch.no_grad()
def par_labels(ffn: FactoredFFN, x_TD: torch.Tensor, t_TD: torch.Tensor, share: float) -> torch.Tensor:
    """The K experts whose own outputs on `x` are nearest to `share` of the target, [T, K] (PAR's pseudo-labels)."""
    return nearest(distances_to_target(ffn, x_TD, t_TD, share), ffn.top_k)


def nearest(distances_TN: torch.Tensor, top_k: int) -> torch.Tensor:
    """The K experts with the least distance, [T, K]."""
    return distances_TN.topk(top_k, dim=1, largest=False).indices


@torch.no_grad()
def distances_to_target(ffn: FactoredFFN, x_TD: torch.Tensor, t_TD: torch.Tensor, share: float) -> torch.Tensor:
    """`par_distances` of a layer's experts, [T, N], less what is the same for all of them.

    `x` and `t` are input and output of the dense teacher's FFN in a true dense forward. What the shared neurons and
    the down bias give every token is taken off the target first; in FactorLLM there are none.
    """
    distances = []
    for x_CD, t_CD in zip(x_TD.split(LABEL_CHUNK_TOKENS), t_TD.split(LABEL_CHUNK_TOKENS), strict=True):
        distances.append(_distances(ffn, ffn.shared_hidden(x_CD), hidden_of_all(x_CD, ffn.experts), t_CD, share))
    return torch.cat(distances)


@torch.no_grad()
def distances_of_hidden(ffn: FactoredFFN, hidden_TF: torch.Tensor, t_TD: torch.Tensor, share: float) -> torch.Tensor:
    """`distances_to_target` where what the neurons give is at hand, in storage order; only W_down is the layer's."""
    distances, shared = [], ffn.shape.shared_size
    for hidden_CF, t_CD in zip(hidden_TF.split(LABEL_CHUNK_TOKENS), t_TD.split(LABEL_CHUNK_TOKENS), strict=True):
        routed_CNH = hidden_CF[:, shared:].unflatten(1, (ffn.shape.num_experts, ffn.shape.expert_size))
        distances.append(_distances(ffn, hidden_CF[:, :shared], routed_CNH, t_CD, share))
    return torch.cat(distances)


def _distances(
    ffn: FactoredFFN, shared_TS: torch.Tensor, routed_TNH: torch.Tensor, t_TD: torch.Tensor, share: float
) -> torch.Tensor:
    return par_distances(routed_TNH, ffn.experts.down_NDH, t_TD - ffn.always_on(shared_TS), share)


def agreement(chosen_TK: torch.Tensor, labels_TK: torch.Tensor) -> torch.Tensor:
    """Share of the teacher's labels that the router chose, mean over tokens; K/N is chance."""
    return (chosen_TK.unsqueeze(2) == labels_TK.unsqueeze(1)).any(2).float().mean()


def expert_counts(chosen_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How many tokens chose each expert, float32 [N]. Unlike bincount it never asks a GPU for its maximum."""
    counts_N = torch.zeros(num_experts, device=chosen_TK.device)
    return counts_N.scatter_add_(0, chosen_TK.flatten(), torch.ones_like(chosen_TK.flatten(), dtype=torch.float32))


def dead_experts(share_LN: list[list[float]], top_k: int) -> list[tuple[int, int]]:
    """(layer, expert) of every expert with less than a hundredth of an even share."""
    return [
        (layer, expert)
        for layer, row in enumerate(share_LN)
        for expert, share in enumerate(row)
        if share < DEAD_SHARE * top_k / len(row)
    ]
