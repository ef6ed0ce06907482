"""Routing decisions that lie nearer to a tie than an engine computes.

Where the K-th and the next expert's logits differ by less than rounding, either choice is right, and the token, and
through attention whatever follows in its sequence, may part from the native model without a fault. Nothing before it
may.

T tokens of all sequences, K top_k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from factorctl.exporting.check.native import LayerRouting


@dataclass(frozen=True)
class Resolution:
    """What difference of two router logits an engine can be held to."""

    absolute: float
    """Times 1 + the token's largest logit: rounding of logits and of the softmax over them."""
    relative: float
    """Times `LayerRouting.unit_noise_T`: how far off the engine's hidden states are, relative to their size."""


FLOAT64 = Resolution(absolute=4 * torch.finfo(torch.float32).eps, relative=1e-6)
"""transformers in float64: routers take the softmax, and norms their mean square, in float32 all the same."""


@dataclass(frozen=True)
class NearTies:
    """Where routing is a matter of rounding."""

    share: float
    """Of all decisions, one per token and layer."""
    sound: list[int]
    """Per sequence, the tokens before the first such decision."""


def near_ties(routing: Sequence[LayerRouting], lengths: Sequence[int], resolution: Resolution) -> NearTies:
    """Find the decisions of a run that `resolution` cannot hold an engine to."""
    if not routing:
        return NearTies(0.0, list(lengths))
    tied_ST = torch.stack([_margin(layer) <= _tolerance(layer, resolution) for layer in routing])
    per_sequence = tied_ST.any(0).split(list(lengths))
    sound = [int(tied.nonzero()[0]) if bool(tied.any()) else len(tied) for tied in per_sequence]
    return NearTies(float(tied_ST.float().mean()), sound)


def changed_choices(ours: Sequence[LayerRouting], theirs: Sequence[LayerRouting]) -> float:
    """Share of the decisions, one per token and layer, that choose other experts."""
    pairs = zip(ours, theirs, strict=True)
    changed = [(a.ids_TK.sort(-1).values != b.ids_TK.sort(-1).values).any(-1) for a, b in pairs]
    return float(torch.cat(changed).float().mean()) if changed else 0.0


def _margin(layer: LayerRouting) -> torch.Tensor:
    """By how much the K-th expert's logit exceeds the next one's, [T]."""
    top_k = layer.ids_TK.shape[1]
    largest_TK = layer.logits_TN.topk(top_k + 1, dim=-1).values
    return largest_TK[:, top_k - 1] - largest_TK[:, top_k]


def _tolerance(layer: LayerRouting, resolution: Resolution) -> torch.Tensor:
    rounding_T = resolution.absolute * (1 + layer.logits_TN.abs().amax(-1))
    return rounding_T + resolution.relative * layer.unit_noise_T
