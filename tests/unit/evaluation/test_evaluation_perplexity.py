"""Perplexity against a plain loop over tokens, in every family; windows, intervals, and a bounded head."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import DenseSource
from support.tiny import CASES, some_ids

from factorctl.errors import FactorctlError, UsageError
from factorctl.evaluation import chunked_head, perplexity
from factorctl.evaluation.chunked_head import next_tokens
from factorctl.evaluation.perplexity import (
    DocumentLoss,
    TextDocument,
    TextScore,
    check_windowing,
    compare_text,
    score_text,
    windows_of,
)
from factorctl.models.loading import load_dense
from factorctl.progress import SilentProgress

LENGTHS = (2, 5, 23, 40, 64)


def documents() -> list[TextDocument]:
    return [
        TextDocument(f"doc:{length}", some_ids(rows=1, length=length, seed=length)[0].tolist()) for length in LENGTHS
    ]


@torch.no_grad()
def plain_loop(model: torch.nn.Module, ids: list[int], window: int, stride: int) -> tuple[float, int]:
    """(loss, hits) of every token but the first, predicted from the window that scores it, one forward pass per token,
    in float64."""
    total, hits, scored, start = 0.0, 0, 1, 0
    while scored < len(ids):
        stop = min(start + window, len(ids))
        for position in range(scored, stop):
            logits = model(torch.tensor([ids[start:position]])).logits[0, -1].double()
            total -= float(logits.log_softmax(-1)[ids[position]])
            hits += int(logits.argmax()) == ids[position]
        scored, start = stop, start + stride
    return total, hits


@pytest.mark.parametrize("case", CASES)
def test_perplexity_is_that_of_a_plain_loop(
    case: str, dense_source: DenseSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perplexity, "BATCH_TOKENS", 40)
    monkeypatch.setattr(chunked_head, "CHUNK_POSITIONS", 7)
    model = load_dense(dense_source(case)).double()
    found = score_text(model, documents(), window=16, stride=6, progress=SilentProgress())
    for document, score in zip(documents(), found.documents, strict=True):
        assert (score.id, score.tokens) == (document.id, len(document.ids) - 1)
        nats, hits = plain_loop(model, list(document.ids), 16, 6)
        assert score.nats == pytest.approx(nats, rel=1e-5)
        assert score.hits == hits
    total = sum(score.nats for score in found.documents) / sum(length - 1 for length in LENGTHS)
    assert found.perplexity == pytest.approx(math.exp(total))


def test_a_window_as_long_as_the_text_needs_no_stride(dense_source: DenseSource) -> None:
    model, ids = load_dense(dense_source()), some_ids(rows=1, length=64)
    whole = score_text(model, [TextDocument("d", ids[0].tolist())], window=64, stride=32, progress=SilentProgress())
    loss = model(ids, labels=ids).loss
    assert whole.mean_nats == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize(("window", "stride"), [(2, 1), (8, 3), (8, 7), (16, 8), (200, 100)])
@pytest.mark.parametrize("length", [2, 3, 8, 9, 33, 100])
def test_every_token_but_the_first_is_scored_once_with_enough_before_it(window: int, stride: int, length: int) -> None:
    scored: list[int] = []
    for found in windows_of(length, window=window, stride=stride):
        assert found.stop - found.start <= window
        for position in range(found.first, found.stop):
            assert position - found.start >= min(position, window - stride)
            scored.append(position)
    assert scored == list(range(1, length))


def test_the_head_never_sees_more_than_a_chunk(dense_source: DenseSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_head, "CHUNK_POSITIONS", 16)
    model, ids = load_dense(dense_source()), some_ids(rows=4, length=24)
    seen: list[int] = []
    handle = model.lm_head.register_forward_hook(lambda _, x, y: seen.append(y.shape[:-1].numel()))
    losses, hits = next_tokens(model, ids)
    handle.remove()
    assert losses.shape == hits.shape == (4, 23)
    assert sum(seen) == 4 * 23
    assert max(seen) == 16
    body = model.model
    assert isinstance(body, torch.nn.Module)
    assert body(input_ids=ids).last_hidden_state.shape == (4, 24, 32), "the body is back in its place"


def test_a_loss_that_is_not_finite_names_its_document(dense_source: DenseSource) -> None:
    model = load_dense(dense_source())
    with torch.no_grad():
        model.lm_head.weight[7, 0] = math.nan
    with pytest.raises(FactorctlError, match="doc:2 is not finite"):
        score_text(model, documents(), window=16, stride=6, progress=SilentProgress())


@pytest.mark.parametrize(
    ("window", "stride", "message"),
    [
        (1, 1, "--window 1 is out of range"),
        (2048, 1, "choose 2 to 1024, the model's context"),
        (64, 64, "--stride 64 does not fit --window 64"),
        (64, 0, "--stride 0 does not fit"),
    ],
)
def test_windows_that_score_nothing_or_leave_gaps_are_refused(window: int, stride: int, message: str) -> None:
    with pytest.raises(UsageError) as refusal:
        check_windowing(window, stride, 1024)
    assert message in str(refusal.value)


def scores(nats: list[float], tokens: list[int]) -> TextScore:
    return TextScore([DocumentLoss(str(i), n, t // 2, t) for i, (n, t) in enumerate(zip(nats, tokens, strict=True))])


def test_one_document_has_no_interval() -> None:
    compared = compare_text(scores([3.0], [2]), scores([2.0], [2]), window=8, stride=4, seed=0)
    assert (compared.ci, compared.log_difference_ci) == (None, None)


def test_the_difference_is_paired_by_document() -> None:
    tokens = [50] * 40
    easy_and_hard = [50.0 * (1 + i % 5) for i in range(40)]
    worse = [nats + 5.0 for nats in easy_and_hard]
    compared = compare_text(scores(worse, tokens), scores(easy_and_hard, tokens), window=8, stride=4, seed=0)
    assert compared.log_difference == pytest.approx(0.1)
    assert compared.log_difference_ci == pytest.approx((0.1, 0.1)), "the documents' own spread cancels"
    assert compared.ci is not None
    assert compared.ci[1] / compared.ci[0] > 1.5, "it does not cancel in the perplexity itself"
    assert compared.model == pytest.approx(compared.dense * math.exp(0.1))


def test_a_huge_loss_is_still_a_number(tmp_path: Path) -> None:
    assert math.isfinite(scores([1e6], [1]).perplexity)
