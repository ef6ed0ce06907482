"""Per-neuron statistics of a dense FFN on calibration tokens, gathered batch by batch.

With h = act(W_gate x) * (W_up x) for token x, and c_t the token's weight in the mean (see `token_weights`):
    importance_f = sqrt(mean_t c_t h_f^2) * ||w_down,f||  the size of what the neuron adds to the residual stream
    rate_f       = share of tokens where |h_f| is among the layer's top tenth   (CMoE, arXiv 2502.04416)
    patterns_pf  = that same membership, for P tokens evenly spread over the calibration set
"""

from __future__ import annotations

import torch

from factorctl.contracts import PATTERN_TOKENS, DenseFFN, LayerStats, Stat

ACTIVE_SHARE = 0.1
"""Share of a layer's neurons that count as active for a token."""


class StatsCollector:
    """Gathers what `needs` names over batches of tokens.

    Args:
        ffn: the layer's weights.
        tokens: how many calibration tokens will come, to spread the pattern sample evenly.
    """

    def __init__(self, ffn: DenseFFN, *, needs: frozenset[Stat], tokens: int) -> None:
        self._ffn, self._needs = ffn, needs
        self._tokens = 0
        self._sum_of_squares_F = torch.zeros(ffn.intermediate_size, dtype=torch.float64)
        self._active_F = torch.zeros(ffn.intermediate_size, dtype=torch.int64)
        self._patterns: list[torch.Tensor] = []
        self._pattern_stride = max(1, tokens // PATTERN_TOKENS)

    def add(self, hidden_TF: torch.Tensor, weight_T: torch.Tensor) -> None:
        """Count the activations of one batch of tokens and the tokens' weights."""
        self._sum_of_squares_F += (weight_T @ hidden_TF.square()).double().cpu()
        if self._needs & {Stat.RATE, Stat.PATTERNS}:
            active_TF = most_active(hidden_TF)
            self._active_F += active_TF.sum(0).cpu()
            first = -self._tokens % self._pattern_stride
            self._patterns.append(active_TF[first :: self._pattern_stride].cpu())
        self._tokens += len(hidden_TF)

    def result(self) -> LayerStats:
        norm_F = self._ffn.down_DF.float().norm(dim=0).double().cpu()
        patterns_PF = torch.cat(self._patterns)[:PATTERN_TOKENS] if Stat.PATTERNS in self._needs else None
        return LayerStats(
            tokens=self._tokens,
            importance_F=((self._sum_of_squares_F / max(1, self._tokens)).sqrt() * norm_F).float(),
            rate_F=self._active_F / max(1, self._tokens) if Stat.RATE in self._needs else None,
            patterns_PF=patterns_PF,
        )


def token_weights(hidden_TD: torch.Tensor) -> torch.Tensor:
    """c_t = 1 / sqrt(mean_d h_td^2) for the residual stream h behind the layer, [T].

    What follows normalises the stream token by token, so an error counts relative to the token's own size, which asks
    for the inverse square. But the few tokens with massive activations (the first of a text), a thousand times larger,
    carry attention for all others and must not be lost. The inverse lets them count for much and decide nothing alone.
    """
    return hidden_TD.square().mean(-1).clamp_min(1e-12).rsqrt()


def most_active(hidden_TF: torch.Tensor) -> torch.Tensor:
    """Boolean [T, F]: each token's top tenth by |h|."""
    count = max(1, round(ACTIVE_SHARE * hidden_TF.shape[1]))
    ids = hidden_TF.abs().topk(count, dim=1).indices
    return torch.zeros_like(hidden_TF, dtype=torch.bool).scatter_(1, ids, value=True)
