"""The losses that turn a factorized model into one that is good at K of N, each a plain function of tensors.

    L = w_lm L_lm + w_par L_par + w_kd L_kd + w_mse L_mse + w_bal L_bal + w_z L_z

Routers learn from L_par, L_bal and L_z (and, through a differentiable gate, from the others), experts from L_lm, L_kd
and L_mse. Router losses are means over layers. Every function computes in float32 at least, and returns a scalar.

T tokens, D hidden_size, N num_experts, H expert_size, K top_k, V vocabulary.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from factorctl.ffn.labels import agreement as agreement
from factorctl.ffn.labels import expert_counts as expert_counts
from factorctl.ffn.labels import par_distances as par_distances
from factorctl.ffn.labels import par_labels as par_labels

IGNORED = -100
"""A target that no loss counts: the next token belongs to another document."""


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """Half-precision tensors as float32; float64, for checks, stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def next_tokens(input_ids_BL: torch.Tensor, position_ids_BL: torch.Tensor) -> torch.Tensor:
    """The token to predict at each place, [B, L]; `IGNORED` at the end of a block and of a document in it."""
    targets_BL = torch.full_like(input_ids_BL, IGNORED)
    targets_BL[:, :-1] = torch.where(position_ids_BL[:, 1:] == 0, IGNORED, input_ids_BL[:, 1:])
    return targets_BL


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
    """sum over tokens of c ||y - t||^2 over that of c ||t||^2, of one layer's FFN output, with c = 1 / ||t||.

    1 where the student gives nothing, alike for all layers. Without the weight c a few tokens with massive activations
    would decide it alone, and the next norm would shrink what was gained.
    """
    target_TD = wide(t_TD)
    size_T = target_TD.square().sum(1).clamp_min(1e-30).sqrt()
    return ((wide(y_TD) - target_TD).square().sum(1) / size_T).sum() / size_T.sum()


def balance_loss(logits_TN: torch.Tensor, chosen_TK: torch.Tensor) -> torch.Tensor:
    """N * sum_e f_e P_e, 1 when the load is even and up to N/K when K experts take it all.

    f_e is the share of (token, expert) pairs that went to e, P_e its mean probability over all experts; the gradient
    runs through P (Switch Transformer, arXiv 2101.03961).
    """
    num_experts = logits_TN.shape[1]
    load_N = expert_counts(chosen_TK, num_experts) / chosen_TK.numel()
    return num_experts * (load_N * F.softmax(wide(logits_TN), dim=-1).mean(0)).sum()


def z_loss(logits_TN: torch.Tensor) -> torch.Tensor:
    """Mean of logsumexp(r)^2: keeps logits small, so that half precision resolves them (ST-MoE, arXiv 2202.08906)."""
    return torch.logsumexp(wide(logits_TN), dim=-1).square().mean()
