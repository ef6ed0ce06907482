"""Routers at unit scale: which experts are chosen, learned apart from how unequally they are weighed.

    chosen: the K largest of V x;   gates: softmax of sigma V x over them;   stored router: sigma V

An analytic router's logits differ by a thousandth where near even gates serve best. Cross-entropy on such logits stays
at log N and an optimiser's step is larger than what it steps from. So V is trained at a scale at which the logits of a
typical token differ by 1, and the sharpness sigma, one number per layer, goes its own way. The stored router stays one
linear map, and a positive sigma leaves the order alone.

What an optimiser holds is V times a layer's reach, the summed size of an input's values: Adam moves every weight by
about the learning rate, and so a logit by the rate, however wide the model and however small its normed inputs are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import functional as F

from factorctl.ffn.routing import logit_spread
from factorctl.models.hooks import watched
from factorctl.training.distiller import Distiller
from factorctl.training.twin_ffn import TwinFFN, twins

MIN_SHARPNESS = 2.0**-12
"""Gates as good as even; below 0 the order would turn round."""


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
