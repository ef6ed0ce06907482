"""Which experts serve a domain best, found on texts that name their domains or, where none does, on clusters of them.

A domain's experts in a layer are the K whose outputs are nearest to their part of what the dense FFN gives, summed over
the domain's tokens: what the oracle asks token by token, asked once. Tokens weigh by the inverse size of the dense
output, so that a few with massive activations do not decide. One pass goes through the model, and every layer is fitted
on what the layers below it leave once theirs are chosen.

R texts; other letters as in `domains`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch.nn import functional as F
from transformers import PreTrainedModel

from factorctl.errors import UsageError
from factorctl.ffn.labels import Teacher, distances_to_target, nearest
from factorctl.ffn.layer import FactoredFFN
from factorctl.models.domains import Domains, choose_by_domain

NUM_CLUSTERS = 8
"""Clusters of texts that name no domain, or as many as there are texts."""
TEXT_TOKENS = 256
"""Tokens that are taken from the beginning of a text."""
READ_PER_TOKEN = 8
"""Tokens read for each that is calibrated on, so that rare domains are met."""


@dataclass(frozen=True)
class DomainText:
    """The token ids of one text."""

    ids: Sequence[int]
    domain: str | None


@dataclass(frozen=True)
class DomainFit:
    """What a model needs to choose by domain."""

    domains: Domains
    experts_LMK: list[torch.Tensor]
    """By layer, the ids of every domain's experts, int32."""


def fit_domains(
    model: PreTrainedModel,
    texts: Sequence[DomainText],
    tokens: int,
    ffns: Sequence[FactoredFFN],
    teacher_of: Callable[[int, FactoredFFN], Teacher],
    *,
    seed: int,
) -> DomainFit:
    """Name the domains of `texts`, and choose the experts of each on about `tokens` tokens, evenly over domains.

    The model chooses by domain from then on.

    Raises:
        UsageError: there is no choice between experts.
    """
    if not all(ffn.routes for ffn in ffns):
        raise UsageError("routing by domain needs a choice between experts", "choose a top-k between 0 and N")
    texts = [DomainText(text.ids[:TEXT_TOKENS], text.domain) for text in texts]
    vectors_RD = torch.stack([_vector(model, text) for text in texts])
    names, labels_R = _labelled(texts, vectors_RD, seed)
    domains = _centred(names, labels_R, vectors_RD)
    chosen = list(_spread([(text, label) for text, label in zip(texts, labels_R, strict=True)], tokens))
    fits = [_Fit(domains, ffn, teacher_of(layer, ffn)) for layer, ffn in enumerate(ffns)]
    ids_BL, real_BL = _padded([text.ids for text, _ in chosen], model.device)
    hook = choose_by_domain(model, domains, [torch.zeros(0)] * len(fits), ffns)
    for ffn, fit in zip(ffns, fits, strict=True):
        fit.real_T, ffn.chooser = real_BL.flatten(), fit
    domains.named = [names[label] for _, label in chosen]
    body = getattr(model, model.base_model_prefix)
    with torch.no_grad():
        body(input_ids=ids_BL, use_cache=False)
    hook.remove()
    tables = [fit.experts_MK for fit in fits]
    choose_by_domain(model, domains, tables, ffns)
    return DomainFit(domains, tables)


class _Fit:
    """Stands in a layer's choice while its experts are found: the first call decides, with weights as they compute."""

    def __init__(self, domains: Domains, ffn: FactoredFFN, teacher: Teacher) -> None:
        self.domains, self.ffn, self.teacher = domains, ffn, teacher
        self.real_T = torch.zeros(0, dtype=torch.bool)
        self.experts_MK = torch.zeros(0, dtype=torch.int32)

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        if not self.experts_MK.numel():
            self.experts_MK = self._best_of_each(x_TD)
        return self.experts_MK[self.domains.of_token_T].long()

    def _best_of_each(self, x_TD: torch.Tensor) -> torch.Tensor:
        t_TD = self.teacher(x_TD).to(x_TD.dtype)
        weight_T = t_TD.float().square().mean(1).clamp_min(1e-30).rsqrt() * self.real_T
        distances_TN = distances_to_target(self.ffn, x_TD, t_TD, 1 / self.ffn.scale_a).float()
        sums_MN = distances_TN.new_zeros(len(self.domains.names), distances_TN.shape[1])
        sums_MN.index_add_(0, self.domains.of_token_T, distances_TN * weight_T.unsqueeze(1))
        return nearest(sums_MN, self.ffn.top_k).sort(dim=1).values.int()


def _vector(model: PreTrainedModel, text: DomainText) -> torch.Tensor:
    ids_L = torch.tensor(list(text.ids), device=model.device)
    with torch.no_grad():
        embedded_LD: torch.Tensor = model.get_input_embeddings()(ids_L)
    return embedded_LD.float().mean(0)


def _labelled(texts: Sequence[DomainText], vectors_RD: torch.Tensor, seed: int) -> tuple[list[str], list[int | None]]:
    """The domains' names, and every text's; None for a text without one beside others that have."""
    named = sorted({text.domain for text in texts if text.domain is not None})
    if named:
        return named, [None if text.domain is None else named.index(text.domain) for text in texts]
    unit_RD = F.normalize(vectors_RD - vectors_RD.mean(0), dim=-1).double().cpu().numpy()
    count = min(NUM_CLUSTERS, len(texts))
    _, found_R = kmeans2(unit_RD, count, minit="++", seed=np.random.default_rng(seed))
    used = sorted(set(found_R.tolist()))
    return [f"cluster {index + 1}" for index in range(len(used))], [used.index(label) for label in found_R.tolist()]


def _centred(names: list[str], labels_R: Sequence[int | None], vectors_RD: torch.Tensor) -> Domains:
    mean_D = vectors_RD.mean(0)
    own = [[row for row, label in enumerate(labels_R) if label == domain] for domain in range(len(names))]
    centres_MD = torch.stack([(vectors_RD[rows] - mean_D).mean(0) for rows in own])
    return Domains(names, mean_D, F.normalize(centres_MD, dim=-1))


def _spread(texts: Sequence[tuple[DomainText, int | None]], tokens: int) -> Iterator[tuple[DomainText, int]]:
    """One text of every domain after the other, until there are tokens enough."""
    rows: dict[int, list[tuple[DomainText, int]]] = {}
    for text, label in texts:
        if label is not None:
            rows.setdefault(label, []).append((text, label))
    taken = 0
    for turn in zip_longest(*(rows[label] for label in sorted(rows))):
        for one in turn:
            if one is not None and (taken < tokens or taken == 0):
                taken += len(one[0].ids)
                yield one


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids filled up at the right, [B, L], and which of them are real."""
    longest = max(map(len, rows))
    ids_BL = torch.zeros(len(rows), longest, dtype=torch.long)
    real_BL = torch.zeros(len(rows), longest, dtype=torch.bool)
    for row, ids in enumerate(rows):
        ids_BL[row, : len(ids)] = torch.tensor(list(ids))
        real_BL[row, : len(ids)] = True
    return ids_BL.to(device), real_BL.to(device)
