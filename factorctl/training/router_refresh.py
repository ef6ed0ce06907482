"""Routers fitted anew, in closed form, every so many tokens.

Gradient steps follow a router's target slowly: the inputs are so correlated that an optimiser of single values crawls
along most directions. Ridge regression on what all tokens so far have taught goes there at once. Each layer adds up
X^T X and X^T Y while it trains; Y is what the router should tell apart, less its mean over the experts: PAR's labels, 1
for K experts and 0 for the others, or the experts' benefits.

D hidden_size, N num_experts.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from factorctl.ffn.ridge import RidgeMoments
from factorctl.training.twin_ffn import TwinFFN

DAMPING = 0.1
"""The pull to 0, in units of the inputs' mean square. Of .001 to .1 the best on text not seen, after 12,288 tokens."""


@torch.no_grad()
def refresh_routers(layers: Iterable[TwinFFN]) -> None:
    """Replace the selection of every layer that has collected something; leave its gates as unequal as they are.

    A fit to labels predicts each label's probability, so that N/K times it is, to first order, the logits of least
    cross-entropy: log(K/N + d) = log(K/N) + d N/K. A fit to benefits has no scale of its own and takes the old one's.
    """
    for twin in layers:
        if twin.moments is None:
            continue
        selection_ND = twin.selection()
        fitted_ND = twin.moments.solve(DAMPING).T.to(selection_ND.dtype)
        new, old = spread_of(fitted_ND, twin.moments), spread_of(selection_ND, twin.moments)
        if new > 0 and old > 0:
            labels = twin.options.refresh_target == "labels"
            unit = twin.options.router_temperature * twin.student.shape.num_experts / twin.student.top_k
            scale = unit if labels else old / new
            twin.student.router.copy_(fitted_ND * scale * twin.reach)
            twin.sharpness.mul_(old / (new * scale))


def spread_of(router_ND: torch.Tensor, moments: RidgeMoments) -> torch.Tensor:
    """How far its logits lie apart on the tokens that were collected: root of their summed square, less their means."""
    centred_ND = router_ND - router_ND.mean(0)
    return ((centred_ND @ moments.gram_II.to(router_ND.dtype)) * centred_ND).sum().clamp_min(0).sqrt()
