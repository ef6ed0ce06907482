"""The closed-form steps on one layer, in order: router, scale, refit; and once more, now that they are known."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from factorctl.calibration.closed_form import (
    RefitResult,
    fit_router,
    fit_scale,
    refit_down,
    relative_error,
)
from factorctl.calibration.tokens import Tokens
from factorctl.ffn.layer import FactoredFFN

FIRST_TURN_DAMPING = 1.0
"""Half of the tokens want a stronger pull than all of them."""


@dataclass(frozen=True)
class LayerFit:
    """Which steps are taken."""

    router: bool = False
    scale: bool = False
    refit: bool = False
    load_limit: float | None = None

    def apply(
        self, ffn: FactoredFFN, fitting: Tokens, heldout: Tokens, dtype: torch.dtype = torch.float32
    ) -> RefitResult | None:
        """Fit the layer to `fitting`; `heldout` tokens judge the refit and enter nothing.

        What is fitted is rounded to `dtype`: the layer runs what will be stored, not what was computed.

        Two turns. The router of the first judges every expert beside a random choice of others, and a refit changes
        what an expert is good for; the second knows whom the first one chooses, and what they give now. So the first
        may do with half of the tokens and one damping. Both refits are pulled toward the source's values, and the
        second turn is kept where it lowers the held-out error.
        """
        source_DF = ffn.down.detach().clone()
        if not (self.router and ffn.routes):
            return self._turn(ffn, fitting, heldout, source_DF, dtype)
        first = self._turn(ffn, fitting.spread(len(fitting) // 2), heldout, source_DF, dtype, FIRST_TURN_DAMPING)
        router_ND, down_DF, scale_a = ffn.router.detach().clone(), ffn.down.detach().clone(), ffn.scale_a
        error = relative_error(ffn, heldout)
        second = self._turn(ffn, fitting, heldout, source_DF, dtype)
        if relative_error(ffn, heldout) >= error:
            ffn.router.copy_(router_ND)
            ffn.down.copy_(down_DF)
            ffn.scale_a = scale_a
            return first
        if first is None or second is None:
            return None
        damping = second.damping if second.kept else first.damping
        return RefitResult(first.error_before, second.error_after, damping, kept=first.kept or second.kept)

    def _turn(
        self,
        ffn: FactoredFFN,
        fitting: Tokens,
        heldout: Tokens,
        source_DF: torch.Tensor,
        dtype: torch.dtype,
        damping: float | None = None,
    ) -> RefitResult | None:
        if self.router:
            fit_router(ffn, fitting, self.load_limit if ffn.routes else None)
            ffn.router.copy_(ffn.router.to(dtype))
        if self.scale:
            fit_scale(ffn, fitting)
        if not self.refit:
            return None
        return refit_down(ffn, fitting, heldout, dtype=dtype, around_DF=source_DF, damping=damping)
