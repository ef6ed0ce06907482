"""Perplexity, token by token, with the text cut into overlapping windows and documents kept apart.

A document of n tokens asks for n - 1 predictions, and each is scored exactly once. A window holds at most `window`
tokens and starts `stride` tokens behind the one before, so a token far into a long document is predicted from at least
window - stride tokens before it. Windows never cross documents.

    perplexity = exp( sum of -log p over all scored tokens / their number )

The sums of every document are kept: intervals are over documents, and the difference of two models is paired by them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from factorctl.errors import FactorctlError, UsageError
from factorctl.evaluation.chunked_head import next_tokens
from factorctl.progress import Progress
from factorctl.reporting.statistics import Interval, ratio_interval

BATCH_TOKENS = 4096
"""Tokens that go through the model's body at once, unless one window alone is longer."""


class Window(NamedTuple):
    """Tokens start..stop of a document, of which the predictions of first..stop count."""

    start: int
    stop: int
    first: int


@dataclass(frozen=True)
class TextDocument:
    """The token ids of one document."""

    id: str
    ids: Sequence[int]
    domain: str | None = None
    """What sort of text it is, where its source says so."""


@dataclass(frozen=True)
class DocumentLoss:
    """Sums over the scored tokens of one document."""

    id: str
    nats: float
    """Of -log p."""
    hits: int
    """Tokens that the model held for the likeliest."""
    tokens: int


@dataclass(frozen=True)
class TextScore:
    """One model on one text."""

    documents: list[DocumentLoss]

    @property
    def tokens(self) -> int:
        return sum(document.tokens for document in self.documents)

    @property
    def mean_nats(self) -> float:
        return math.fsum(document.nats for document in self.documents) / self.tokens

    @property
    def perplexity(self) -> float:
        return bounded_exp(self.mean_nats)

    @property
    def accuracy(self) -> float:
        """Share of the tokens that the model held for the likeliest."""
        return sum(document.hits for document in self.documents) / self.tokens


@dataclass(frozen=True)
class PerplexityComparison:
    """A model and the dense one on the same text. Intervals are at 95%, over documents; None for a single document."""

    model: float
    dense: float
    ci: Interval | None
    """Of the model's perplexity."""
    dense_ci: Interval | None
    log_difference: float
    """ln(model) - ln(dense): the loss added per token, in nats. 0.1 is 10.5% more perplexity."""
    log_difference_ci: Interval | None
    """Paired: both models are resampled with the same documents."""
    accuracy: float
    """Share of the next tokens that the model held for the likeliest."""
    dense_accuracy: float
    accuracy_kept: float | None
    """The one over the other; None where the dense model has none right."""
    tokens: int
    documents: int
    window: int
    stride: int


def windows_of(length: int, *, window: int, stride: int) -> Iterator[Window]:
    """Windows over a document of `length` tokens; every token but the first is scored in exactly one of them."""
    scored = 1
    for start in range(0, length, stride):
        stop = min(start + window, length)
        yield Window(start, stop, scored)
        if stop == length:
            return
        scored = stop


def check_windowing(window: int, stride: int, context: int | None) -> None:
    """Refuse windows that score nothing, leave gaps or do not fit the model.

    Raises:
        UsageError: naming the option and the limit.
    """
    if window < 2 or (context is not None and window > context):
        limit = "2 or more" if context is None else f"2 to {context}, the model's context"
        raise UsageError(f"--window {window} is out of range", f"choose {limit} tokens")
    if not 1 <= stride < window:
        raise UsageError(
            f"--stride {stride} does not fit --window {window}",
            f"choose 1 to {window - 1}: a window must hold tokens of the one before it to predict from",
        )


def score_text(
    model: PreTrainedModel,
    documents: Sequence[TextDocument],
    *,
    window: int,
    stride: int,
    progress: Progress,
    title: str = "Perplexity",
    name_rows: Callable[[Sequence[str | None]], None] = lambda _: None,
) -> TextScore:
    """Score every document; windows of like length share a batch.

    Args:
        name_rows: told the domain of every row of a batch before the model is called with it.

    Raises:
        FactorctlError: a loss is not finite.
    """
    work = [
        (index, found)
        for index, document in enumerate(documents)
        for found in windows_of(len(document.ids), window=window, stride=stride)
    ]
    work.sort(key=lambda item: item[1].stop - item[1].start, reverse=True)
    nats, hits = [0.0] * len(documents), [0] * len(documents)
    total = sum(found.stop - found.first for _, found in work)
    with progress.stage(title, total=total, unit="tokens") as task:
        for batch in _batches(work):
            name_rows([documents[index].domain for index, _ in batch])
            scored = _score_batch(model, documents, batch)
            for (index, found), (loss, hit) in zip(batch, scored, strict=True):
                nats[index] += loss
                hits[index] += hit
                task.advance(found.stop - found.first)
    scores = [
        DocumentLoss(document.id, loss, hit, len(document.ids) - 1)
        for document, loss, hit in zip(documents, nats, hits, strict=True)
    ]
    wrong = next((score.id for score in scores if not math.isfinite(score.nats)), None)
    if wrong is not None:
        raise FactorctlError(
            f"the loss on {wrong} is not finite",
            "try --dtype float32; if it is that already, the model is damaged: `factorctl verify`, or fetch it again",
        )
    return TextScore(scores)


def _batches(work: Sequence[tuple[int, Window]]) -> Iterator[list[tuple[int, Window]]]:
    """Windows, longest first, in batches of at most `BATCH_TOKENS` tokens with their padding."""
    start = 0
    while start < len(work):
        longest = work[start][1].stop - work[start][1].start
        rows = max(1, BATCH_TOKENS // longest)
        yield list(work[start : start + rows])
        start += rows


def _score_batch(
    model: PreTrainedModel, documents: Sequence[TextDocument], batch: Sequence[tuple[int, Window]]
) -> list[tuple[float, int]]:
    """(sum of -log p, hits) over what each window scores. Causal attention never sees the padding at the right."""
    longest = batch[0][1].stop - batch[0][1].start
    ids_BL = torch.zeros(len(batch), longest, dtype=torch.long)
    for row, (index, found) in enumerate(batch):
        ids = list(documents[index].ids[found.start : found.stop])
        ids_BL[row, : len(ids)] = torch.tensor(ids)
    found_BL = next_tokens(model, ids_BL.to(model.device))
    losses_BL, hits_BL = found_BL.losses_BL.double().cpu(), found_BL.hits_BL.cpu()
    spans = [slice(found.first - found.start - 1, found.stop - found.start - 1) for _, found in batch]
    return [
        (float(losses_L[span].sum()), int(hits_L[span].sum()))
        for span, losses_L, hits_L in zip(spans, losses_BL, hits_BL, strict=True)
    ]


def by_domain(documents: Sequence[TextDocument], score: TextScore) -> dict[str, TextScore]:
    """A score cut by the documents' domains, in the order in which they are met; empty where none is named."""
    found: dict[str, list[DocumentLoss]] = {}
    for document, loss in zip(documents, score.documents, strict=True):
        if document.domain is not None:
            found.setdefault(document.domain, []).append(loss)
    return {domain: TextScore(losses) for domain, losses in found.items()}


def compare_text(model: TextScore, dense: TextScore, *, window: int, stride: int, seed: int) -> PerplexityComparison:
    """Set two scores of the same documents side by side."""
    assert [d.id for d in model.documents] == [d.id for d in dense.documents], "scores of different texts"
    counts = [float(document.tokens) for document in model.documents]
    ours, theirs = ([document.nats for document in score.documents] for score in (model, dense))
    difference = [a - b for a, b in zip(ours, theirs, strict=True)]
    return PerplexityComparison(
        model=model.perplexity,
        dense=dense.perplexity,
        ci=_exponentiated(ratio_interval(ours, counts, seed=seed)),
        dense_ci=_exponentiated(ratio_interval(theirs, counts, seed=seed)),
        log_difference=math.fsum(difference) / sum(counts),
        log_difference_ci=ratio_interval(difference, counts, seed=seed),
        accuracy=model.accuracy,
        dense_accuracy=dense.accuracy,
        accuracy_kept=model.accuracy / dense.accuracy if dense.accuracy else None,
        tokens=model.tokens,
        documents=len(model.documents),
        window=window,
        stride=stride,
    )


def _exponentiated(interval: Interval | None) -> Interval | None:
    return None if interval is None else (bounded_exp(interval[0]), bounded_exp(interval[1]))


def bounded_exp(value: float) -> float:
    """exp, at most what a float holds."""
    return math.exp(min(value, 700.0))
