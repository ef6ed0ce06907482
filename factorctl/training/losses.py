"""The losses that turn a factorized model into one that is good at K of N, each a plain function of tensors.

    L = w_lm L_lm + w_par L_par + w_kd L_kd + w_mse L_mse + w_bal L_bal + w_z L_z

Routers learn from L_par, L_bal and L_z (and, through a differentiable gate, from the others), experts from L_lm, L_kd
and L_mse. Router losses are means over layers. Every function computes in float32 at least, and returns a scalar.

T tokens, D hidden_size, N num_experts, H expert_size, K top_k, V vocabulary.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from factorctl.models.factored_ffn import FactoredFFN
from factorctl.models.paths import hidden_of_all

IGNORED = -100
"""A target that no loss counts: the next token belongs to another document."""
LABEL_CHUNK_TOKENS = 4096


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """Half-precision tensors as float32; float64, for checks, stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def next_tokens(input_ids_BL: torch.Tensor, position_ids_BL: torch.Tensor) -> torch.Tensor:
    """The token to predict at each place, [B, L]; `IGNORED` at the end of a block and of a document in it."""
    targets_BL = torch.full_like(input_ids_BL, IGNORED)
    targets_BL[:, :-1] = torch.where(position_ids_BL[:, 1:] == 0, IGNORED, input_ids_BL[:, 1:])
    return targets_BL


def par_distances(
    hidden_TNH: torch.Tensor, down_NDH: torch.Tensor, target_TD: torch.Tensor, share: float
) -> torch.Tensor:
    """||o_e - share*t||^2 - ||share*t||^2 = ||o_e||^2 - 2 share <o_e, t> for every expert, [T, N].

    o_e = W_down,e h_e is expert e's output. Neither it nor [T, N, D] is formed where H <= D: <o_e, t> is h_e on
    W_down,e^T t, and ||o_e||^2 is h_e^T G_e h_e with the Gram matrix G_e = W_down,e^T W_down,e [H, H]. Wider experts
    take their outputs one by one.

    Args:
        share: what of the target one expert should give; K/N in FactorLLM (arXiv 2408.11855), whose t/(N/K) it is.
    """
    if down_NDH.shape[2] > down_NDH.shape[1]:
        outputs = (hidden_TH @ down_DH.T for hidden_TH, down_DH in zip(hidden_TNH.unbind(1), down_NDH, strict=True))
        columns = [o_TD.square().sum(1) - 2 * share * (o_TD * target_TD).sum(1) for o_TD in outputs]
        return torch.stack(columns, dim=1)
    hidden_NTH = hidden_TNH.transpose(0, 1)
    gram_NHH = down_NDH.transpose(1, 2) @ down_NDH
    pulled_NTH = hidden_NTH @ gram_NHH - 2 * share * (target_TD @ down_NDH)
    return (hidden_NTH * pulled_NTH).sum(-1).T


@torch.no_grad()
def par_labels(ffn: FactoredFFN, x_TD: torch.Tensor, t_TD: torch.Tensor, share: float) -> torch.Tensor:
    """The K experts whose own outputs on `x` are nearest to `share` of the target, [T, K] (PAR's pseudo-labels).

    `x` and `t` are input and output of the dense teacher's FFN in a true dense forward. What the shared neurons and
    the down bias give every token is taken off the target first; in FactorLLM there are none.
    """
    chunks = zip(x_TD.split(LABEL_CHUNK_TOKENS), t_TD.split(LABEL_CHUNK_TOKENS), strict=True)
    labels = []
    for x_CD, t_CD in chunks:
        if ffn.shape.shared_size:
            t_CD = t_CD - F.linear(ffn.shared_hidden(x_CD), ffn.down[:, : ffn.shape.shared_size])
        if ffn.down_bias is not None:
            t_CD = t_CD - ffn.down_bias
        distances_CN = par_distances(hidden_of_all(x_CD, ffn.experts), ffn.experts.down_NDH, t_CD, share)
        labels.append(distances_CN.topk(ffn.top_k, dim=1, largest=False).indices)
    return torch.cat(labels)


def par_loss(logits_TN: torch.Tensor, labels_TK: torch.Tensor) -> torch.Tensor:
    """Multi-label cross-entropy: the mean over the K labels of -log softmax(r)_e.

    Its least value is log K, where the labelled experts share the probability. FactorLLM's router loss, except that
    the released code takes the divergence in the other direction, against softmax(multi-hot).
    """
    return -F.log_softmax(wide(logits_TN), dim=-1).gather(1, labels_TK).mean()


def lm_loss(logits_TV: torch.Tensor, targets_T: torch.Tensor, *, reduction: str = "mean") -> torch.Tensor:
    """Next-token cross-entropy over the tokens whose target is not `IGNORED`."""
    return F.cross_entropy(wide(logits_TV), targets_T, ignore_index=IGNORED, reduction=reduction)


def kd_loss(student_TV: torch.Tensor, teacher_TV: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """tau^2 KL(teacher || student) of the next-token distributions at temperature tau, mean over tokens.

    Hinton et al., arXiv 1503.02531; tau^2 keeps the gradient's size comparable between temperatures.
    """
    student, teacher = wide(student_TV), wide(teacher_TV)
    if temperature != 1.0:
        student, teacher = student / temperature, teacher / temperature
    student, teacher = F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def mse_loss(y_TD: torch.Tensor, t_TD: torch.Tensor) -> torch.Tensor:
    """||y - t||^2 / ||t||^2 of one layer's FFN output: 1 where the student gives nothing, alike for all layers."""
    target_TD = wide(t_TD)
    return (wide(y_TD) - target_TD).square().sum() / target_TD.square().sum().clamp_min(1e-30)


def balance_loss(logits_TN: torch.Tensor, chosen_TK: torch.Tensor) -> torch.Tensor:
    """N * sum_e f_e P_e, 1 when the load is even and up to N/K when K experts take it all.

    f_e is the share of (token, expert) pairs that went to e, P_e its mean probability over all experts; the gradient
    runs through P (Switch Transformer, arXiv 2101.03961).
    """
    num_experts = logits_TN.shape[1]
    load_N = expert_counts(chosen_TK, num_experts) / chosen_TK.numel()
    return num_experts * (load_N * F.softmax(wide(logits_TN), dim=-1).mean(0)).sum()


def expert_counts(chosen_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How many tokens chose each expert, float32 [N]. Unlike bincount it never asks a GPU for its maximum."""
    counts_N = torch.zeros(num_experts, device=chosen_TK.device)
    return counts_N.scatter_add_(0, chosen_TK.flatten(), torch.ones_like(chosen_TK.flatten(), dtype=torch.float32))


def z_loss(logits_TN: torch.Tensor) -> torch.Tensor:
    """Mean of logsumexp(r)^2: keeps logits small, so that half precision resolves them (ST-MoE, arXiv 2202.08906)."""
    return torch.logsumexp(wide(logits_TN), dim=-1).square().mean()


def agreement(chosen_TK: torch.Tensor, labels_TK: torch.Tensor) -> torch.Tensor:
    """Share of the teacher's labels that the router chose, mean over tokens; K/N is chance."""
    return (chosen_TK.unsqueeze(2) == labels_TK.unsqueeze(1)).any(2).float().mean()
