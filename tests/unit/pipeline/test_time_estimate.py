"""The estimate of `factorize --dry-run`: what is counted is what is done, and each part moves with what it hangs on."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from support.tiny import make_model, make_tokenizer

from factorctl.config.factorize import FactorizeConfig
from factorctl.config.shape import factor_shape
from factorctl.data.sampling import sample_documents
from factorctl.pipeline.common.time_estimate import (
    CALLS_PER_LAYER,
    EARLY_ENDS,
    DenseSize,
    Rates,
    Sampling,
    factorize_seconds,
    measured_rates,
)

SIZE = DenseSize(hidden_size=64, num_layers=2, vocabulary=320, parameters=100_000, source_bytes=400_000)
RATES = Rates(flops=1e9, thin_flops=1e8, calls=1e6, drawn_rows=1e5, hashed_bytes=1e9)
SELF = Sampling(document_length=256, batch_size=32)


def seconds(sampling: Sampling | None = SELF, **changes: Any) -> dict[str, float]:
    config = dataclasses.replace(FactorizeConfig(model="m", num_experts=4), **changes).resolved()
    shape = factor_shape(128, num_experts=4, top_k=2, shared_fraction=0)
    return factorize_seconds(config, shape, SIZE, sampling, RATES, calibrates=True, compressed=True)


@pytest.mark.parametrize("tokens", [1, 40, 500, 2000])
def test_the_steps_of_sampling_are_those_that_are_taken(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where documents run to their full length: none of the tiny model's tokens ends one."""
    model, tokenizer = make_model(), make_tokenizer()
    monkeypatch.setattr("factorctl.data.sampling._stop_ids", lambda *_: [])
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    sampling = Sampling(document_length=16, batch_size=8)
    drawn = list(sample_documents(model, tokenizer, tokens=tokens, document_length=16, batch_size=8))
    assert sum(len(document.tokens or ()) for document in drawn) >= tokens
    assert len(calls) <= sampling.steps(tokens) <= len(calls) + 15, "the last batch may end early"


def test_a_small_model_takes_as_long_as_its_calls() -> None:
    """64K tokens drawn one by one by a model of two layers: seconds of calls, next to no arithmetic."""
    part = seconds(calibration_tokens=64_000)["sampling text"]
    calls = EARLY_ENDS * SELF.steps(64_256) * SIZE.num_layers * CALLS_PER_LAYER / RATES.calls
    assert calls == pytest.approx(1.35, rel=0.05)
    assert part > calls


def test_parts_that_hang_on_tokens_grow_with_them() -> None:
    few, many = seconds(calibration_tokens=4096), seconds(calibration_tokens=16_384)
    assert few["reading and writing"] == many["reading and writing"]
    for part in ("sampling text", "running the model", "fitting", "partitioning"):
        assert 2 < many[part] / few[part] < 4.5, part


def test_what_is_not_done_takes_no_time() -> None:
    assert "sampling text" not in seconds(None, calibration="notes.txt")
    assert seconds(strategy="contiguous")["partitioning"] == 0
    assert seconds(strategy="clustered")["partitioning"] < seconds(strategy="routed")["partitioning"]
    assert seconds(router="random")["fitting"] < seconds()["fitting"] < seconds(refit=True)["fitting"]
    config = FactorizeConfig(model="m", num_experts=4, strategy="contiguous", router="random").resolved()
    shape = factor_shape(128, num_experts=4, top_k=2, shared_fraction=0)
    parts = factorize_seconds(config, shape, SIZE, SELF, RATES, calibrates=False, compressed=False)
    assert parts == {"reading and writing": 4 * 400_000 / 1e9, "partitioning": 0}


def test_rates_are_measured() -> None:
    rates = measured_rates(torch.device("cpu"), SELF, SIZE.vocabulary)
    assert min(dataclasses.astuple(rates)) > 0
