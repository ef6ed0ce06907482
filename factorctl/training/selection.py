"""Routers at unit scale: which experts are chosen, learned apart from how unequally they are weighed.

    chosen: the K largest of V x;   gates: softmax of sigma V x over them;   stored router: sigma V

An analytic router's logits differ by a thousandth where near even gates serve best. Cross-entropy on such logits stays
at log N and an optimiser's step is larger than what it steps from. So V is trained at a scale at which the logits of a
typical token differ by 1, and the sharpness sigma, one number per layer, goes its own way. The stored router stays one
linear map, and a positive sigma leaves the order alone.

What an optimiser holds is V times a layer's reach, the summed size of an input's values: Adam moves every weight by
about the learning rate, and so a logit by the rate, however wide the model and however small its normed inputs are.

Every so many tokens V may be fitted anew, in closed form. Gradient steps follow a router's target slowly: the inputs
are so correlated that an optimiser of single values crawls along most directions. Ridge regression on what all tokens
so far have taught goes there at once. Each layer adds up X^T X and X^T Y while it trains; Y is what the router should
tell apart, less its mean over the experts: PAR's labels, 1 for K experts and 0 for the others, or the experts'
benefits.

D hidden_size, N num_experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import functional as F

from factorctl.ffn.ridge import RidgeMoments
from factorctl.ffn.routing import logit_spread
from factorctl.models.hooks import watched
from factorctl.training.distiller import Distiller
from factorctl.training.twin_ffn import TwinFFN, twins

MIN_SHARPNESS = 2.0**-12
"""Gates as good as even; below 0 the order would turn round."""
REFRESH_DAMPING = 0.1
"""The pull of a fit to 0, in units of the inputs' mean square. Of .001 to .1 the best on text not seen, after 12,288
tokens."""


@torch.no_grad()
def to_unit_spread(
    distiller: Distiller, input_ids_BL: torch.Tensor, position_ids_BL: torch.Tensor, accelerator: Any
) -> None:
    """Divide every router that is trained by its logits' spread on some text, which becomes its sharpness; set reach.

    Both rounded to powers of two, so that the product is the stored router to the last bit. All processes must call
    this, with the same text, so that their number decides nothing.
    """
    trained = [twin for twin in twins(distiller.model) if twin.routes and twin.student.router.requires_grad]
    found: dict[TwinFFN, torch.Tensor] = {}

    def look(twin: TwinFFN, inputs: tuple[torch.Tensor]) -> None:
        if twin.options.role != "student":
            return
        x_TD = inputs[0].flatten(0, -2).to(twin.student.router.dtype)
        found[twin] = torch.stack([logit_spread(F.linear(x_TD, twin.student.router)), x_TD.abs().sum(1).median()])

    with watched(trained, before=look):
        distiller(input_ids_BL, position_ids_BL)  # as a whole: a shared model is put together from the outside in
    if not trained:
        return
    sizes = accelerator.reduce(torch.stack([found[twin] for twin in trained]), reduction="mean").tolist()
    for twin, (sharpness, reach) in zip(trained, (map(_power_of_two, pair) for pair in sizes), strict=True):
        twin.student.router.mul_(reach / sharpness)
        twin.sharpness.fill_(sharpness)
        twin.reach.fill_(reach)


def _power_of_two(size: float) -> float:
    """The nearest one; 1 for a router or an input that is all zero."""
    return 2.0 ** round(math.log2(size)) if size > 0 else 1.0


@torch.no_grad()
def keep_order(layers: Iterable[TwinFFN]) -> None:
    """After a step: no sharpness at or below 0."""
    for twin in layers:
        if twin.sharpness.requires_grad:
            twin.sharpness.clamp_(min=MIN_SHARPNESS)


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
        fitted_ND = twin.moments.solve(REFRESH_DAMPING).T.to(selection_ND.dtype)
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
    return ((centred_ND @ moments.gram().to(router_ND.dtype)) * centred_ND).sum().clamp_min(0).sqrt()
