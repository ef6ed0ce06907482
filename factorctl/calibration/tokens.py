"""What one FFN is calibrated on: its inputs, what it should give, and what its neurons do on the way.

T tokens, D hidden_size, F intermediate_size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

CHUNK_TOKENS = 4096
HIDDEN_BYTES = 2 << 30
"""Activations [T, F] larger than this are computed again wherever they are needed. Smaller ones are kept: they are
two thirds of the FFN's arithmetic, and each closed-form step needs them."""


@dataclass(frozen=True)
class Tokens:
    """Inputs, targets and activations of one FFN on calibration tokens."""

    x_TD: torch.Tensor
    t_TD: torch.Tensor
    weight_T: torch.Tensor
    """How much each token's squared error counts; see `statistics.token_weights`."""
    hidden_TF: torch.Tensor | None = None
    """act(W_gate x) * (W_up x) in the source's neuron order; None where it was not kept."""

    def __len__(self) -> int:
        return len(self.x_TD)

    @property
    def weight_T1(self) -> torch.Tensor:
        return self.weight_T.unsqueeze(1)

    def chunks(self) -> Iterator[Tokens]:
        """The tokens by `CHUNK_TOKENS`."""
        return (self[start : start + CHUNK_TOKENS] for start in range(0, len(self), CHUNK_TOKENS))

    def split(self, first: int) -> tuple[Tokens, Tokens]:
        """The first `first` tokens and the rest."""
        return self[:first], self[first:]

    def spread(self, count: int) -> Tokens:
        """At most `count` of the tokens, evenly spread, in their order."""
        return self[:: -(-len(self) // count)]

    def __getitem__(self, rows: slice) -> Tokens:
        hidden_TF = None if self.hidden_TF is None else self.hidden_TF[rows]
        return Tokens(self.x_TD[rows], self.t_TD[rows], self.weight_T[rows], hidden_TF)
