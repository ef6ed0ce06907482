"""The closed-form steps on one factored FFN: analytic router, fitted scale, refit of the down-projection.

Each takes the inputs x that the layer sees behind the already factored layers below it (the compressed stream) and
the target t: what the layer's dense FFN gives on these inputs. No gradients; seconds per layer.

T tokens, D hidden_size, N num_experts, K top_k, F intermediate_size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import torch
from torch.nn import functional as F

from factorctl.calibration.tokens import Tokens
from factorctl.ffn.labels import along_and_square, expert_counts
from factorctl.ffn.layer import FactoredFFN
from factorctl.ffn.paths import hidden_of_all
from factorctl.ffn.ridge import RidgeMoments
from factorctl.ffn.routing import logit_spread, scatter_weights

T = TypeVar("T")
ROUTER_DAMPING = 1e-3
PRICE_ROUNDS = 200
PRICED_SHARE = 0.97
"""Part of the load limit that prices aim at, so that steps about it end within."""
FIRST_PRICE_STEP = 0.5
"""Of the prices, in units of the logits' spread for a load of twice the limit; later steps are smaller."""
NEAR_TIE = 1e-4
SHARPNESS_TOKENS = 2048
SCALE_TOKENS = 4096
"""Enough for one number."""
MIDDLE_DAMPING, HIGHER_DAMPINGS, LOWER_DAMPINGS = 0.3, (1.0, 3.0), (0.1, 0.03)
"""Candidates for the pull toward the original values; held-out tokens choose."""
SHARPNESSES = (1e-3, 0.1, 0.25, 0.5, 1.0, 2.0)
"""Candidates for the `logit_spread` of the router; the first gives uniform gates, just enough that order survives."""


def hidden_in_order(ffn: FactoredFFN, tokens: Tokens) -> torch.Tensor:
    """act(gate x) * (up x) of every neuron in storage order, shared ones first, [T, F]: the caller's own copy."""
    if tokens.hidden_TF is not None:
        return tokens.hidden_TF.index_select(1, ffn.neuron_ids)  # indexing with [] takes five times as long
    routed_TNH = hidden_of_all(tokens.x_TD, ffn.experts)
    return torch.cat([ffn.shared_hidden(tokens.x_TD), routed_TNH.flatten(1)], dim=1)


def weighted_hidden(ffn: FactoredFFN, tokens: Tokens) -> torch.Tensor:
    """What the columns of W_down that run multiply, [T, R] in storage order: their product is the output without bias.

    All R = F of them may run, but where K = 0: there the S shared ones alone do.
    """
    return _weigh(ffn, hidden_in_order(ffn, tokens), _weights(ffn, tokens))


def _weights(ffn: FactoredFFN, tokens: Tokens) -> torch.Tensor:
    """Every expert's weight for every token, zero where it does not run, [T, N]."""
    return scatter_weights(ffn.route(tokens.x_TD), ffn.shape.num_experts)


def _weigh(ffn: FactoredFFN, hidden_TF: torch.Tensor, weights_TN: torch.Tensor) -> torch.Tensor:
    """`weighted_hidden` from the activations in storage order, which are overwritten."""
    if ffn.top_k == ffn.shape.num_experts:
        return hidden_TF
    shared_TS, routed_TR = hidden_TF.tensor_split([ffn.shape.shared_size], dim=1)
    if ffn.top_k == 0:
        return shared_TS
    routed_TR.unflatten(1, (ffn.shape.num_experts, -1)).mul_(weights_TN.unsqueeze(-1))
    return hidden_TF


def output(ffn: FactoredFFN, tokens: Tokens) -> torch.Tensor:
    """The factored FFN's output, [T, D], from activations that are there already."""
    return _down(ffn, weighted_hidden(ffn, tokens))


def relative_error(ffn: FactoredFFN, tokens: Tokens) -> float:
    """sqrt( sum_t c_t ||ffn(x_t) - t_t||^2 / sum_t c_t ||t_t||^2 )."""
    return _error_behind(ffn, ((weighted_hidden(ffn, chunk), chunk) for chunk in tokens.chunks()))


def _error_behind(ffn: FactoredFFN, chunks: Iterable[tuple[torch.Tensor, Tokens]]) -> float:
    """`relative_error` of tokens whose `weighted_hidden` is known."""
    wrong = right = 0.0
    for hidden_TR, chunk in chunks:
        wrong += float(((_down(ffn, hidden_TR) - chunk.t_TD).square() * chunk.weight_T1).sum())
        right += float((chunk.t_TD.square() * chunk.weight_T1).sum())
    return float((wrong / max(1e-30, right)) ** 0.5)


def _down(ffn: FactoredFFN, hidden_TR: torch.Tensor) -> torch.Tensor:
    return F.linear(hidden_TR, ffn.down[:, : hidden_TR.shape[1]], ffn.down_bias)


def benefits(ffn: FactoredFFN, tokens: Tokens) -> torch.Tensor:
    """How much lower the squared error is with expert e than without it, beside the others that now run, [T, N].

    With y the layer's output, r = t - y and a the weight of an expert:
        2a <o_e, r> + a^2 ||o_e||^2   for an expert that is among the K,
        2a <o_e, r> - a^2 ||o_e||^2   for one that would join them.
    Judged alone, beside the shared neurons, an expert takes the credit for what others give as well: routers fitted to
    that choose many of a kind, and with 48 of 72 chosen the layers' errors are 2 to 3% larger.
    """
    hidden_TF = hidden_in_order(ffn, tokens)
    weights_TN = _weights(ffn, tokens)
    missing_TD = tokens.t_TD - _down(ffn, _weigh(ffn, hidden_TF.clone(), weights_TN))
    routed_TNH = hidden_TF[:, ffn.shape.shared_size :].unflatten(1, (ffn.shape.num_experts, -1))
    along_TN, square_TN = along_and_square(routed_TNH, ffn.experts.down_NDH, missing_TD)
    a = ffn.scale_a
    return 2 * a * along_TN + a**2 * torch.where(weights_TN > 0, square_TN, -square_TN)


def fit_router(ffn: FactoredFFN, tokens: Tokens, load_limit: float | None = None) -> None:
    """Set the router to the ridge regression of each expert's benefit on x, then choose its sharpness.

    Order of the logits decides which experts run; their spread decides how unequal the softmax gate weighs them.
    The regression fixes the first, a search that goes up `SHARPNESSES` while the output error falls the second.

    A choice hangs on the order of a token's logits alone, so every token's benefits are taken at mean 0 and deviation
    1. As they are, they are a thousand times larger for the few tokens with massive activations: those alone would be
    fitted, and rounding would choose for everyone else.

    Args:
        load_limit: the largest load of an expert on these tokens, in even shares; see `with_prices`.
    """
    moments = RidgeMoments(ffn.hidden_size, ffn.shape.num_experts + 1, tokens.x_TD.device)
    for chunk in tokens.chunks():
        moments.add(chunk.x_TD, F.pad(standardised(benefits(ffn, chunk)), (0, 1), value=1.0))
    direction_ND, unit_1D = moments.solve(ROUTER_DAMPING).T.split([ffn.shape.num_experts, 1])
    spread = max(float(logit_spread(tokens.x_TD @ direction_ND.T)), 1e-20)
    if load_limit is not None:
        direction_ND = with_prices(
            direction_ND, unit_1D[0], tokens.x_TD, top_k=ffn.top_k, limit=load_limit, spread=spread
        )
    direction_ND = direction_ND / spread
    if ffn.gate == "hard" or ffn.top_k <= 1:
        ffn.router.copy_(direction_ND)
        return
    sample = tokens.spread(SHARPNESS_TOKENS)

    def tried(sharpness: float) -> tuple[float, torch.Tensor]:
        ffn.router.copy_(direction_ND * sharpness)
        return relative_error(ffn, sample), ffn.router.detach().clone()

    _, router_ND = _last_to_fall(map(tried, SHARPNESSES))
    ffn.router.copy_(router_ND)


def _last_to_fall(candidates: Iterable[tuple[float, T]]) -> tuple[float, T]:
    """Of (error, what has it) the last one before the error no longer falls; none is made beyond."""
    remaining = iter(candidates)
    best = next(remaining)
    for candidate in remaining:
        if candidate[0] >= best[0]:
            break
        best = candidate
    return best


def with_prices(
    router_ND: torch.Tensor, unit_D: torch.Tensor, x_TD: torch.Tensor, *, top_k: int, limit: float, spread: float
) -> torch.Tensor:
    """The router with prices under which its largest load on `x` is least, or within the limit.

    An expert's load is the share of the tokens that choose it, K/N when even. Whoever serves a batch with its experts
    on several devices waits for the busiest one. Lowering the logits of busy experts by a price λ_e each moves just
    enough tokens to their next choice. A router is linear and has no bias to carry a price; but normalised inputs lie
    on one side of a hyperplane, so that some u has <u, x> near 1 for all of them, and  W' = W - λ u^T  is a linear
    router again.

    Args:
        unit_D: u of the least squares problem <u, x> = 1.
        limit: the largest load allowed, in even shares: 1 is even, N/K no limit.
        spread: of the logits, the unit of the prices.
    """
    logits_TN, unit_T1 = x_TD @ router_ND.T, (x_TD @ unit_D).unsqueeze(1)
    even = top_k * len(x_TD) / len(router_ND)
    price_N = torch.zeros(len(router_ND), device=x_TD.device)
    best_N, best_load = price_N, float("inf")
    for turn in range(PRICE_ROUNDS):
        chosen_TK = (logits_TN - unit_T1 * price_N).topk(top_k, dim=1).indices
        load_N = expert_counts(chosen_TK, len(router_ND)) / even
        if float(load_N.max()) < best_load:
            best_N, best_load = price_N, float(load_N.max())
        if best_load <= limit:
            break
        step = FIRST_PRICE_STEP * spread / (1 + turn / 10)
        price_N = (price_N + step * (load_N.clamp_min(0.1) / (PRICED_SHARE * limit)).log2()).clamp_min(0)
    return router_ND - best_N.unsqueeze(1) * unit_D


def standardised(benefit_TN: torch.Tensor) -> torch.Tensor:
    """Each token's row at mean 0 and standard deviation 1; a row without differences becomes zeros."""
    centred_TN = benefit_TN - benefit_TN.mean(dim=1, keepdim=True)
    return centred_TN / centred_TN.square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-20)


def near_ties(logits_TN: torch.Tensor, top_k: int) -> float:
    """Share of the tokens whose choice hangs on less than `NEAR_TIE` of the logits' spread: rounding decides it."""
    highest_TK = logits_TN.topk(top_k + 1, dim=1).values
    margin_T = highest_TK[:, top_k - 1] - highest_TK[:, top_k]
    return float((margin_T <= NEAR_TIE * logit_spread(logits_TN)).float().mean())


def expert_load(logits_TN: torch.Tensor, top_k: int) -> list[float]:
    """Per expert the share of the tokens that choose it, to four digits; K/N is even."""
    counts_N = expert_counts(logits_TN.topk(top_k, dim=1).indices, logits_TN.shape[1])
    return [round(share, 4) for share in (counts_N / len(logits_TN)).tolist()]


def fit_scale(ffn: FactoredFFN, tokens: Tokens) -> float:
    """The least-squares scalar a = <y, r> / <y, y>, y the routed output at a = 1 and r what it should be."""
    if not ffn.routes:
        return 1.0
    ffn.scale_a = 1.0
    along = norm = 0.0
    for chunk in tokens.spread(SCALE_TOKENS).chunks():
        hidden_TF = weighted_hidden(ffn, chunk)
        fixed_TD = ffn.always_on(hidden_TF[:, : ffn.shape.shared_size])
        routed_TD = _down(ffn, hidden_TF) - fixed_TD
        along += float((routed_TD * (chunk.t_TD - fixed_TD) * chunk.weight_T1).sum())
        norm += float((routed_TD.square() * chunk.weight_T1).sum())
    ffn.scale_a = along / norm if norm else 1.0
    return ffn.scale_a


@dataclass(frozen=True)
class RefitResult:
    """Held-out relative errors of one layer's output, and whether the new values were kept."""

    error_before: float
    error_after: float
    damping: float
    kept: bool


def refit_down(
    ffn: FactoredFFN,
    tokens: Tokens,
    heldout: Tokens,
    *,
    dtype: torch.dtype = torch.float32,
    around_DF: torch.Tensor | None = None,
    damping: float | None = None,
) -> RefitResult:
    """Refit W_down to the target, given the routing:  min ||Z W^T - t||^2 + damping * ||W - W0||^2.

    Z [T, F] holds the shared neurons' activations and the routed ones times their gate weight, zero where an expert
    was not chosen. The damping with the least error on held-out tokens wins; if none lowers it, the layer keeps its
    values. The search goes up from the middle one while that helps, or else down. Candidates are rounded to `dtype`, in
    which the result will be stored, before they are judged. At K = 0 the columns that never run stay as they are, and
    the damping still counts by the mean square of all F activations.

    Args:
        around_DF: W0; None takes the layer's present values.
        damping: None searches for it.
    """
    running = ffn.shape.intermediate_size if ffn.top_k else ffn.shape.shared_size
    moments = RidgeMoments(running, ffn.hidden_size, tokens.x_TD.device)
    for chunk in tokens.chunks():
        target_TD = chunk.t_TD if ffn.down_bias is None else chunk.t_TD - ffn.down_bias
        root_T1 = chunk.weight_T1.sqrt()
        moments.add(weighted_hidden(ffn, chunk).mul_(root_T1), target_TD * root_T1)
    judges = [(weighted_hidden(ffn, chunk), chunk) for chunk in heldout.chunks()]
    down_DR = ffn.down[:, :running]
    present_DR = down_DR.detach().clone()
    pulled_to_RD = (present_DR if around_DF is None else around_DF[:, :running]).T
    before = _error_behind(ffn, judges)
    solve = moments.solver(pulled_to_RD)

    def refitted(pull: float) -> tuple[float, tuple[float, torch.Tensor]]:
        down_DR.copy_(solve(pull * running / ffn.shape.intermediate_size).T.to(dtype))
        return _error_behind(ffn, judges), (pull, down_DR.detach().clone())

    first = best = refitted(MIDDLE_DAMPING if damping is None else damping)
    for others in (HIGHER_DAMPINGS, LOWER_DAMPINGS) if damping is None else ():
        if best is first:
            best = _last_to_fall(chain([first], map(refitted, others)))
    error, (used, refitted_DR) = best if best[0] < before else (before, (0.0, present_DR))
    down_DR.copy_(refitted_DR)
    return RefitResult(before, error, used, kept=error < before)
