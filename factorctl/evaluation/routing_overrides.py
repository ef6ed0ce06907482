"""Other choices of experts than the router's, for controls: at random, and by the teacher (the oracle).

Only the choice is exchanged. The chosen experts' weights are still what the gate makes of the router's logits,
y = FFN_shared(x) + s * sum_{e in C} p_e(x) FFN_e(x), so that a control differs from the model in C alone.

T tokens, D hidden_size, N num_experts, K top_k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from factorctl.ffn.labels import Teacher, par_labels
from factorctl.ffn.layer import Chooser, FactoredFFN
from factorctl.models.building import factored_ffns


class RandomChoice:
    """K of N experts for every token, all choices equally likely, drawn anew each time the layer runs.

    The draws follow one seeded stream per layer: the same calls in the same order give the same choices.
    """

    def __init__(self, ffn: FactoredFFN, *, seed: int, layer: int) -> None:
        self.num_experts, self.top_k = ffn.shape.num_experts, ffn.top_k
        self.seed, self.generator = seed * 100_003 + layer, torch.Generator()
        self.restart()

    def restart(self) -> None:
        """Begin the stream of draws again."""
        self.generator.manual_seed(self.seed)

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        odds_TN = torch.rand(x_TD.shape[0], self.num_experts, generator=self.generator)
        return odds_TN.topk(self.top_k, dim=1).indices.to(x_TD.device)


class OracleChoice:
    """The K experts whose outputs are nearest to their part of what the dense FFN gives on the same input.

    The best choice by PAR's own measure, which looks at experts one by one: a choice of K together could do better.
    """

    def __init__(self, ffn: FactoredFFN, teacher: Teacher) -> None:
        self.ffn, self.teacher = ffn, teacher

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        return par_labels(self.ffn, x_TD, self.teacher(x_TD).to(x_TD.dtype), 1 / self.ffn.scale_a)


@contextmanager
def choosing(model: PreTrainedModel, chooser_of: Callable[[int, FactoredFFN], Chooser]) -> Iterator[None]:
    """Let every factored FFN of `model` take its experts from `chooser_of(layer, ffn)` while the block runs."""
    ffns = list(factored_ffns(model))
    for layer, ffn in enumerate(ffns):
        ffn.chooser = chooser_of(layer, ffn)
    try:
        yield
    finally:
        for ffn in ffns:
            ffn.chooser = None
