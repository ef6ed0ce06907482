"""Ridge least squares from accumulated moments: one pass over the tokens, memory independent of their number."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

PANEL = 256
"""Columns of X^T X that are multiplied at once: narrow ones skip more of the lower half, wide ones run faster."""


class RidgeMoments(nn.Module):
    """X^T X and X^T Y over batches, for  min_W ||X W - Y||^2 + lambda * m * ||W - W0||^2.

    m is the mean diagonal entry of X^T X, so that `damping` = lambda has no unit.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        super().__init__()
        self.upper_II: torch.Tensor
        """X^T X on and above the diagonal; below it whatever the panels happen to hold."""
        self.cross_IO: torch.Tensor
        self.register_buffer("upper_II", torch.zeros(inputs, inputs, dtype=torch.float32, device=device))
        self.register_buffer("cross_IO", torch.zeros(inputs, outputs, dtype=torch.float32, device=device))

    def add(self, x_TI: torch.Tensor, y_TO: torch.Tensor) -> None:
        for first in range(0, x_TI.shape[1], PANEL):
            panel_TP, onward_TI = x_TI[:, first : first + PANEL], x_TI[:, first:]
            self.upper_II[first : first + PANEL, first:].addmm_(panel_TP.T, onward_TI)
        self.cross_IO.addmm_(x_TI.T, y_TO)

    def gram(self) -> torch.Tensor:
        """X^T X [I, I]."""
        return self.upper_II.triu() + self.upper_II.triu(1).T

    def solve(self, damping: float, around_IO: torch.Tensor | None = None) -> torch.Tensor:
        """W [I, O], pulled toward `around_IO` (zero if None)."""
        return self.solver(around_IO)(damping)

    def solver(self, around_IO: torch.Tensor | None = None) -> Callable[[float], torch.Tensor]:
        """`solve` for one damping after the other."""
        gram_II = self.gram()
        mean = float(gram_II.diagonal().mean())
        residual_IO = self.cross_IO if around_IO is None else self.cross_IO - gram_II @ around_IO

        def solve(damping: float) -> torch.Tensor:
            regular_II = gram_II.double()
            regular_II.diagonal().add_(max(damping * mean, torch.finfo(torch.float32).tiny))
            change_IO = torch.cholesky_solve(residual_IO.double(), _cholesky(regular_II)).float()
            return change_IO if around_IO is None else around_IO + change_IO

        return solve


def _cholesky(matrix_II: torch.Tensor) -> torch.Tensor:
    """Cholesky factor; rounding in the moments is met with a growing diagonal."""
    jitter = 1e-9 * float(matrix_II.diagonal().mean())
    while True:
        factor: torch.Tensor
        factor, failed = torch.linalg.cholesky_ex(matrix_II)
        if not failed:
            return factor
        matrix_II.diagonal().add_(jitter)
        jitter *= 10
