"""Routers fitted anew, in closed form, every so many tokens.

Gradient steps follow a router's target slowly: the inputs are so correlated that an optimiser of single values crawls
along most directions. Ridge regression on what the last tokens taught goes there at once. Each layer adds up X^T X and
X^T Y while it trains; Y is what the router should tell apart, PAR's labels or the experts' benefits.

D hidden_size, N num_experts.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from factorctl.models.ridge import RidgeMoments
from factorctl.training.twin_ffn import TwinFFN

DAMPING = 1e-3
"""As calibration's: the pull to 0, in units of the inputs' mean square."""


@torch.no_grad()
def refresh_routers(layers: Iterable[TwinFFN]) -> None:
    """Replace every selection that has collected something, at the spread that it has, and begin to collect anew."""
    for twin in layers:
        if twin.moments is not None:
            twin.student.router.copy_(fitted(twin.moments, twin.student.router))
            twin.moments.clear()


def fitted(moments: RidgeMoments, router_ND: torch.Tensor) -> torch.Tensor:
    """The ridge solution, [N, D], scaled so that its logits spread as far over the experts as those of `router_ND`."""
    solved_ND = _centred(moments.solve(DAMPING).T).to(router_ND.dtype)
    new, old = (_spread(router, moments) for router in (solved_ND, _centred(router_ND)))
    return solved_ND * (old / new) if new > 0 and old > 0 else router_ND


def _centred(router_ND: torch.Tensor) -> torch.Tensor:
    """The same choice and the same gates: what all logits have in common says nothing."""
    return router_ND - router_ND.mean(0)


def _spread(router_ND: torch.Tensor, moments: RidgeMoments) -> torch.Tensor:
    """Root of the summed square of the logits over the tokens that were collected."""
    return ((router_ND @ moments.gram_II.to(router_ND.dtype)) * router_ND).sum().clamp_min(0).sqrt()
