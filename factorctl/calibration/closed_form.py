"""The closed-form steps on one factored FFN: analytic router, fitted scale, refit of the down-projection.

Each takes the inputs x that the layer sees behind the already factored layers below it (the compressed stream) and
the target t: what the layer's dense FFN gives on these inputs. No gradients; seconds per layer.

T tokens, D hidden_size, N num_experts, K top_k, F intermediate_size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from factorctl.models.factored_ffn import FactoredFFN
from factorctl.models.paths import hidden_of_all
from factorctl.models.ridge import RidgeMoments
from factorctl.models.routing import scatter_weights

CHUNK_TOKENS = 4096
ROUTER_DAMPING = 1e-3
REFIT_DAMPINGS = (0.03, 0.1, 0.3, 1.0)
"""Candidates for the pull toward the original values; held-out tokens choose."""
SHARPNESSES = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0)
"""Candidates for the spread of the router's logits; 0 gives uniform gates and is kept tiny so that order survives."""


@dataclass(frozen=True)
class Tokens:
    """Inputs and targets of one FFN on calibration tokens."""

    x_TD: torch.Tensor
    t_TD: torch.Tensor
    weight_T: torch.Tensor
    """How much each token's squared error counts; see `statistics.token_weights`."""

    def chunks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(x_TD, t_TD, weight_T1) by `CHUNK_TOKENS`."""
        columns = (self.x_TD, self.t_TD, self.weight_T.unsqueeze(1))
        return zip(*(column.split(CHUNK_TOKENS) for column in columns), strict=True)

    def split(self, first: int) -> tuple[Tokens, Tokens]:
        """The first `first` tokens and the rest."""
        columns = (self.x_TD, self.t_TD, self.weight_T)
        return Tokens(*(column[:first] for column in columns)), Tokens(*(column[first:] for column in columns))


def relative_error(ffn: FactoredFFN, tokens: Tokens) -> float:
    """sqrt( sum_t c_t ||ffn(x_t) - t_t||^2 / sum_t c_t ||t_t||^2 )."""
    wrong = right = 0.0
    for x_TD, t_TD, weight_T1 in tokens.chunks():
        wrong += float(((ffn(x_TD) - t_TD).square() * weight_T1).sum())
        right += float((t_TD.square() * weight_T1).sum())
    return float((wrong / max(1e-30, right)) ** 0.5)


def outputs_of_experts(ffn: FactoredFFN, x_TD: torch.Tensor) -> Iterator[torch.Tensor]:
    """FFN_e(x) [T, D] of one expert after another; all of them together are never held."""
    hidden_TNH = hidden_of_all(x_TD, ffn.experts)
    for hidden_TH, down_DH in zip(
        hidden_TNH.unbind(1), torch.split(ffn.experts.down_DR, ffn.shape.expert_size, dim=1), strict=True
    ):
        yield F.linear(hidden_TH, down_DH)


def always_on(ffn: FactoredFFN, x_TD: torch.Tensor) -> torch.Tensor:
    """What every token gets: the shared neurons' output plus the down bias, [T, D]."""
    y_TD = torch.zeros_like(x_TD)
    if ffn.shape.shared_size:
        y_TD = F.linear(ffn.shared_hidden(x_TD), ffn.down[:, : ffn.shape.shared_size])
    return y_TD if ffn.down_bias is None else y_TD + ffn.down_bias


def benefits(ffn: FactoredFFN, x_TD: torch.Tensor, t_TD: torch.Tensor) -> torch.Tensor:
    """How much the squared error drops when expert e alone joins the shared neurons: 2<o_e, r> - ||o_e||^2, [T, N]."""
    rest_TD = t_TD - always_on(ffn, x_TD)
    return torch.stack(
        [2 * (o_TD * rest_TD).sum(1) - o_TD.square().sum(1) for o_TD in outputs_of_experts(ffn, x_TD)], dim=1
    )


def fit_router(ffn: FactoredFFN, tokens: Tokens) -> None:
    """Set the router to the ridge regression of each expert's benefit on x, then choose its sharpness.

    Order of the logits decides which experts run; their spread decides how unequal the softmax gate weighs them.
    The regression fixes the first, a search over `SHARPNESSES` for the least output error the second.
    """
    moments = RidgeMoments(ffn.hidden_size, ffn.shape.num_experts, tokens.x_TD.device)
    for x_TD, t_TD, weight_T1 in tokens.chunks():
        moments.add(x_TD, benefits(ffn, x_TD, t_TD) * weight_T1)
    direction_ND = moments.solve(ROUTER_DAMPING).T
    spread = float((tokens.x_TD[:CHUNK_TOKENS] @ direction_ND.T).std(dim=1).mean())
    direction_ND = direction_ND / max(spread, 1e-20)
    if ffn.gate == "hard" or ffn.top_k <= 1:
        ffn.router.copy_(direction_ND)
        return
    sample, _ = tokens.split(CHUNK_TOKENS)

    def error(sharpness: float) -> float:
        ffn.router.copy_(direction_ND * max(sharpness, 1e-3))
        return relative_error(ffn, sample)

    best = min(SHARPNESSES, key=error)
    ffn.router.copy_(direction_ND * max(best, 1e-3))


def fit_scale(ffn: FactoredFFN, tokens: Tokens) -> float:
    """The least-squares scalar a = <y, r> / <y, y>, y the routed output at a = 1 and r what it should be."""
    if ffn.top_k in (0, ffn.shape.num_experts):
        return 1.0
    ffn.scale_a = 1.0
    along = norm = 0.0
    for x_TD, t_TD, weight_T1 in tokens.chunks():
        fixed_TD = always_on(ffn, x_TD)
        routed_TD = ffn(x_TD) - fixed_TD
        along += float((routed_TD * (t_TD - fixed_TD) * weight_T1).sum())
        norm += float((routed_TD.square() * weight_T1).sum())
    ffn.scale_a = along / norm if norm else 1.0
    return ffn.scale_a


@dataclass(frozen=True)
class RefitResult:
    """Held-out relative errors of one layer's output, and whether the new values were kept."""

    error_before: float
    error_after: float
    damping: float
    kept: bool


def refit_down(ffn: FactoredFFN, tokens: Tokens, heldout: Tokens, *, dtype: torch.dtype = torch.float32) -> RefitResult:
    """Refit W_down to the target, given the routing:  min ||Z W^T - t||^2 + damping * ||W - W0||^2.

    Z [T, F] holds the shared neurons' activations and the routed ones times their gate weight, zero where an expert
    was not chosen. The damping with the least error on held-out tokens wins; if none lowers it, W0 stays. Candidates
    are rounded to `dtype`, in which the result will be stored, before they are judged.
    """
    moments = RidgeMoments(ffn.shape.intermediate_size, ffn.hidden_size, tokens.x_TD.device)
    for x_TD, t_TD, weight_T1 in tokens.chunks():
        target_TD = t_TD if ffn.down_bias is None else t_TD - ffn.down_bias
        root_T1 = weight_T1.sqrt()
        moments.add(weighted_hidden(ffn, x_TD) * root_T1, target_TD * root_T1)
    original_DF = ffn.down.detach().clone()
    before = relative_error(ffn, heldout)
    best_error, best_damping, best_DF = before, 0.0, original_DF
    for damping in REFIT_DAMPINGS:
        ffn.down.copy_(moments.solve(damping, around_IO=original_DF.T).T.to(dtype))
        error = relative_error(ffn, heldout)
        if error < best_error:
            best_error, best_damping, best_DF = error, damping, ffn.down.detach().clone()
    ffn.down.copy_(best_DF)
    return RefitResult(before, best_error, best_damping, kept=best_error < before)


def weighted_hidden(ffn: FactoredFFN, x_TD: torch.Tensor) -> torch.Tensor:
    """What W_down multiplies, [T, F] in storage order: its rows times W_down^T are the layer's output without bias."""
    parts = [ffn.shared_hidden(x_TD)] if ffn.shape.shared_size else []
    routed_TNH = hidden_of_all(x_TD, ffn.experts)
    if ffn.top_k == 0:
        routed_TNH = torch.zeros_like(routed_TNH)
    elif ffn.top_k < ffn.shape.num_experts:
        routed_TNH = routed_TNH * scatter_weights(ffn.route(x_TD), ffn.shape.num_experts).unsqueeze(-1)
    return torch.cat([*parts, routed_TNH.flatten(1)], dim=1)
