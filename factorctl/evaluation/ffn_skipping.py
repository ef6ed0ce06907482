"""FFN-SkipLLM (arXiv 2404.03865): whole FFN blocks in the middle of the model are left out, token by token.

The first and the last layers (the paper's cold regions) always run. In between, once the residual stream of a token
hardly turns any more when a block's output is added,

    cos(h, h + FFN(h)) >= threshold,

the next two blocks of the middle are skipped for that token: their FFN adds nothing, attention goes on as ever. The
block behind them runs and is asked again. That is our reading of "greedy" skipping of some blocks at once. To skip all
that is left of the middle rests on a cosine that only rises from layer to layer, as the paper sees it in models of 7B
and more; where it rises and falls, a token that looks saturated early would lose twenty blocks in a row.

The paper skips 25 to 30% of all blocks. Where more is asked for than two at once can give, more are skipped at once.
The threshold is calibrated so that the blocks that run hold a given share of all; what really ran is counted. The
paper's warm-up, in which the first tokens that are generated skip nothing, has no counterpart where a text is scored
in one pass; the first position, which carries massive activations, skips nothing here.

T tokens, D hidden_size, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from factorctl.models.building import decoder_layers
from factorctl.models.hooks import watched

COLD_SHARE = 0.1
"""Share of the layers at either end that always run, at least one."""
CALIBRATION_TOKENS = 2048
"""Tokens on which thresholds are tried."""
BISECTIONS = 10
PAPER_SHARE = 0.75
"""Of the FFN blocks that run in the paper, where its results are."""
GREED = 2
"""Blocks that are skipped at once, at least."""
ALWAYS = math.inf
"""A threshold that no block reaches: nothing is skipped."""
NEVER = -2.0
"""In place of a cosine, what reaches no threshold."""


@dataclass
class SkipState:
    """What the layers of one model share: the threshold, who skips in this pass, and what has run so far."""

    threshold: float = ALWAYS
    cold: int = 1
    num_layers: int = 1
    greed: int = GREED
    """Blocks that a saturated token skips at once."""
    to_skip_BL: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    """How many of the next blocks each token of this pass skips."""
    similarities: list[torch.Tensor] | None = None
    """The cosines [T] of every middle block that ran, where they are being recorded."""
    blocks_run: int = 0
    blocks_seen: int = 0

    def is_cold(self, layer: int) -> bool:
        return layer < self.cold or layer >= self.num_layers - self.cold

    @property
    def share_run(self) -> float:
        """Part of the FFN blocks that ran, over all tokens since the start."""
        return self.blocks_run / self.blocks_seen if self.blocks_seen else 1.0

    def restart(self) -> None:
        """Count from zero."""
        self.blocks_run = self.blocks_seen = 0


class SkippingFFN(nn.Module):
    """A dense FFN that runs for the tokens that do not skip it.

    Args:
        behind: what the FFN's output passes before it joins the residual stream (Gemma 2, 3), or None.
    """

    def __init__(self, ffn: nn.Module, behind: nn.Module | None, state: SkipState, layer: int) -> None:
        super().__init__()
        self.ffn = ffn
        self.behind: tuple[nn.Module, ...] = () if behind is None else (behind,)  # a tuple: it is not our submodule
        self.state, self.layer = state, layer
        self.residual_BLD: torch.Tensor | None = None
        """The stream in front of the FFN's norm, noted by a hook on that norm."""

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        state = self.state
        if self.layer == 0:
            state.to_skip_BL = torch.zeros(x_BLD.shape[:2], dtype=torch.long, device=x_BLD.device)
        cold = state.is_cold(self.layer)
        runs_BL = (state.to_skip_BL == 0) | cold
        state.blocks_seen += runs_BL.numel()
        state.blocks_run += int(runs_BL.sum())
        y_BLD = torch.zeros_like(x_BLD)
        y_BLD[runs_BL] = self.ffn(x_BLD[runs_BL])
        if not cold:
            self._saturate(y_BLD, runs_BL)
        return y_BLD

    def _saturate(self, y_BLD: torch.Tensor, runs_BL: torch.Tensor) -> None:
        assert self.residual_BLD is not None, "the norm in front of the FFN did not run"
        state, h_BLD = self.state, self.residual_BLD
        added_BLD: torch.Tensor = self.behind[0](y_BLD) if self.behind else y_BLD
        cosine_BL = F.cosine_similarity(h_BLD.float(), (h_BLD + added_BLD).float(), dim=-1)
        if cosine_BL.shape[1] > 1:  # a single token is one that is being generated
            cosine_BL[:, 0] = NEVER
        if state.similarities is not None:
            state.similarities.append(cosine_BL.flatten().cpu())
        saturated_BL = (cosine_BL >= state.threshold).long()
        state.to_skip_BL = torch.where(runs_BL, state.greed * saturated_BL, state.to_skip_BL - 1)


@contextmanager
def skipping_ffns(model: PreTrainedModel, *, post_ffn_norm: bool) -> Iterator[SkipState]:
    """Let the FFNs of a dense model be skipped while the block runs; nothing is until a threshold is set."""
    layers = decoder_layers(model)
    state = SkipState(cold=max(1, round(COLD_SHARE * len(layers))), num_layers=len(layers))
    with ExitStack() as undone:
        for layer, block in enumerate(layers):
            behind = block.get_submodule("post_feedforward_layernorm") if post_ffn_norm else None
            skipping = SkippingFFN(block.get_submodule("mlp"), behind, state, layer)
            norm = block.get_submodule("pre_feedforward_layernorm" if post_ffn_norm else "post_attention_layernorm")

            def note(_: nn.Module, inputs: tuple[torch.Tensor, ...], noting: SkippingFFN = skipping) -> None:
                noting.residual_BLD = inputs[0]

            undone.enter_context(watched([norm], before=note))
            undone.callback(setattr, block, "mlp", skipping.ffn)
            block.mlp = skipping
        yield state


@torch.no_grad()
def calibrate_threshold(model: PreTrainedModel, state: SkipState, ids_BL: torch.Tensor, share: float) -> float:
    """Set the threshold at which `share` of the FFN blocks run on these tokens; returns the share that it gives.

    Candidates are the cosines of a pass in which nothing is skipped; a bisection tries them in passes that do skip,
    since every skipped block moves what later layers see. Where even the least that can run is more than `share`, that
    least is taken.
    """
    batches = ids_BL[: max(1, CALIBRATION_TOKENS // ids_BL.shape[1])].split(8)
    state.greed = _greed(state, share)
    candidates = _cosines(model, state, batches)
    if not len(candidates):
        return 1.0
    low, high = 0, len(candidates) - 1
    tried: dict[float, float] = {}
    for _ in range(BISECTIONS):
        at = (low + high) // 2
        state.threshold = float(candidates[at])
        _run(model, batches)
        tried[state.threshold] = state.share_run
        state.restart()
        low, high = (at + 1, high) if tried[state.threshold] < share else (low, at)
        if low >= high:
            break
    state.threshold = min(tried, key=lambda threshold: abs(tried[threshold] - share))
    return tried[state.threshold]


def _greed(state: SkipState, share: float) -> int:
    """How many blocks must be skipped at once so that no more than `share` of all can be left running."""
    middle = state.num_layers - 2 * state.cold
    left = share * state.num_layers - 2 * state.cold
    return max(GREED, math.ceil(middle / left - 1) if left > 0 else middle)


def _cosines(model: PreTrainedModel, state: SkipState, batches: Sequence[torch.Tensor]) -> torch.Tensor:
    """The cosines of all middle blocks and tokens when nothing is skipped, sorted."""
    state.threshold, state.similarities = ALWAYS, []
    _run(model, batches)
    recorded, state.similarities = state.similarities, None
    state.restart()
    found = torch.cat(recorded) if recorded else torch.zeros(0)
    return found[found > NEVER].sort().values


def _run(model: PreTrainedModel, batches: Sequence[torch.Tensor]) -> None:
    for batch in batches:
        model(batch.to(model.device), use_cache=False, logits_to_keep=1)
