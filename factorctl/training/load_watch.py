"""Watching for experts that no token chooses any more."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from factorctl.ffn.labels import dead_experts as dead_experts
from factorctl.progress import Progress

WINDOW_TOKENS = 32_768


@dataclass
class LoadWatch:
    """Counts the load over windows of tokens and warns once of each expert that is dead in one."""

    top_k: int
    balance: float
    """The weight of the balance loss: what the warning says to raise."""
    progress: Progress
    idle: frozenset[tuple[int, int]] = frozenset()
    """(layer, expert) of those that hardly any token chose when the model was factorized: no fault of training."""
    tokens: int = 0
    load_LN: torch.Tensor | None = None
    warned: set[tuple[int, int]] = field(default_factory=set)

    def add(self, load_LN: torch.Tensor, tokens: int) -> None:
        """Count one step; at the end of a window look for dead experts."""
        self.load_LN = load_LN.clone() if self.load_LN is None else self.load_LN + load_LN
        self.tokens += tokens
        if self.tokens >= WINDOW_TOKENS:
            self.look()

    def look(self) -> None:
        """Warn of what is dead in the tokens counted so far, and start a new window."""
        if self.load_LN is None:
            return
        share_LN = self.load_LN / self.tokens
        for layer, expert in dead_experts(share_LN.tolist(), self.top_k):
            if (layer, expert) not in self.warned | self.idle:
                self.warned.add((layer, expert))
                self.progress.note(
                    f"layer {layer}: expert {expert} was chosen by {float(share_LN[layer, expert]):.2%} of the last "
                    f"{self.tokens:,} tokens (an even share is {self.top_k / share_LN.shape[1]:.0%}); "
                    f"raise the balance loss: --loss balance={max(0.1, 4 * self.balance):g}"
                )
        self.load_LN, self.tokens = None, 0
