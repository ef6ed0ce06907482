"""Routers fitted anew, in closed form, every so many tokens.

Gradient steps follow a router's target slowly: the inputs are so correlated that an optimiser of single values crawls
along most directions. Ridge regression on what the last tokens taught goes there at once. Each layer adds up X^T X and
X^T Y while it trains; Y is what the router should tell apart, less its mean over the experts: PAR's labels, 1 for K
experts and 0 for the others, or the experts' benefits.

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
    """Replace every selection that has collected something, leave the gates as unequal as they are, and begin anew.

    A fit to labels predicts each label's probability, so that N/K times it is, to first order, the logits of least
    cross-entropy: log(K/N + d) = log(K/N) + d N/K. A fit to benefits has no scale of its own and takes the old one's.
    """
    for twin in layers:
        if twin.moments is None:
            continue
        selection_ND = twin.student.router
        fitted_ND = twin.moments.solve(DAMPING).T.to(selection_ND.dtype)
        new, old = spread_of(fitted_ND, twin.moments), spread_of(selection_ND, twin.moments)
        if new > 0 and old > 0:
            labels = twin.options.refresh_target == "labels"
            scale = selection_ND.shape[0] / twin.student.top_k if labels else old / new
            selection_ND.copy_(fitted_ND * scale)
            twin.sharpness.mul_(old / (new * scale))
        twin.moments.clear()


def spread_of(router_ND: torch.Tensor, moments: RidgeMoments) -> torch.Tensor:
    """How far its logits lie apart on the tokens that were collected: root of their summed square, less their means."""
    centred_ND = router_ND - router_ND.mean(0)
    return ((centred_ND @ moments.gram_II.to(router_ND.dtype)) * centred_ND).sum().clamp_min(0).sqrt()
