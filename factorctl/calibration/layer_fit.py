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
class FitResult:
    """How near a layer now comes to its target, and what the refit had to do with it."""

    error: float
    """`relative_error` on held-out tokens."""
    refit: RefitResult | None


@dataclass(frozen=True)
class LayerFit:
    """Which steps are taken."""

    router: bool = False
    scale: bool = False
    refit: bool = False
    load_limit: float | None = None

    def apply(
        self, ffn: FactoredFFN, fitting: Tokens, heldout: Tokens, dtype: torch.dtype = torch.float32
    ) -> FitResult:
        """Fit the layer to `fitting`; `heldout` tokens judge it and enter nothing.

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
        second = self._turn(ffn, fitting, heldout, source_DF, dtype)
        if second.error >= first.error:
            ffn.router.copy_(router_ND)
            ffn.down.copy_(down_DF)
            ffn.scale_a = scale_a
            return first
        return FitResult(second.error, _both(first.refit, second.refit))

    def _turn(
        self,
        ffn: FactoredFFN,
        fitting: Tokens,
        heldout: Tokens,
        source_DF: torch.Tensor,
        dtype: torch.dtype,
        damping: float | None = None,
    ) -> FitResult:
        if self.router:
            fit_router(ffn, fitting, self.load_limit if ffn.routes else None)
            ffn.router.copy_(ffn.router.to(dtype))
        if self.scale:
            fit_scale(ffn, fitting)
        if not self.refit:
            return FitResult(relative_error(ffn, heldout), None)
        refit = refit_down(ffn, fitting, heldout, dtype=dtype, around_DF=source_DF, damping=damping)
        return FitResult(refit.error_after, refit)


def _both(first: RefitResult | None, second: RefitResult | None) -> RefitResult | None:
    """Two refits as one."""
    if first is None or second is None:
        return None
    damping = second.damping if second.kept else first.damping
    return RefitResult(first.error_before, second.error_after, damping, kept=first.kept or second.kept)
