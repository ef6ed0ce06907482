"""The closed-form steps on one layer, in order: router, scale, refit; and once more, now that the refit is known."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from factorctl.calibration.closed_form import RefitResult, fit_router, fit_scale, refit_down
from factorctl.calibration.tokens import Tokens
from factorctl.ffn.layer import FactoredFFN


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

        A refit changes what an expert is good for, so the router that was fitted before it no longer knows. Router and
        refit are fitted once more, the refit pulled toward the source's values as the first one, and kept where that
        lowers the held-out error.
        """
        source_DF = ffn.down.detach().clone()
        first = self._once(ffn, fitting, heldout, source_DF, dtype)
        if first is None or not (self.router and ffn.routes):
            return first
        router_ND, down_DF, scale_a = ffn.router.detach().clone(), ffn.down.detach().clone(), ffn.scale_a
        second = self._once(ffn, fitting, heldout, source_DF, dtype)
        assert second is not None
        if second.error_after < first.error_after:
            return replace(second, error_before=first.error_before, kept=True)
        ffn.router.copy_(router_ND)
        ffn.down.copy_(down_DF)
        ffn.scale_a = scale_a
        return first

    def _once(
        self, ffn: FactoredFFN, fitting: Tokens, heldout: Tokens, source_DF: torch.Tensor, dtype: torch.dtype
    ) -> RefitResult | None:
        if self.router:
            fit_router(ffn, fitting, self.load_limit if ffn.routes else None)
            ffn.router.copy_(ffn.router.to(dtype))
        if self.scale:
            fit_scale(ffn, fitting)
        return refit_down(ffn, fitting, heldout, dtype=dtype, around_DF=source_DF) if self.refit else None
