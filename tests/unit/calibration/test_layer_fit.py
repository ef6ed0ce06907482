"""Router, scale and refit in order, twice where the refit moved what experts are good for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_calibration_closed_form import make_ffn, make_tokens

from factorctl.calibration import layer_fit
from factorctl.calibration.closed_form import RefitResult, fit_router, refit_down, relative_error
from factorctl.calibration.layer_fit import FIRST_TURN_DAMPING, FitResult, LayerFit
from factorctl.calibration.tokens import Tokens
from factorctl.ffn.layer import FactoredFFN

ALL = LayerFit(router=True, scale=True, refit=True)


def test_two_turns_are_at_least_as_good_as_one() -> None:
    ffn, once = make_ffn(shared=5), make_ffn(shared=5)
    fitting, heldout = make_tokens(ffn, 1200).split(1000)
    fit_router(once, fitting.spread(500))
    one = refit_down(once, fitting.spread(500), heldout)
    result = replace(ALL, scale=False).apply(ffn, fitting, heldout)
    assert result.refit is not None
    assert result.refit.error_before == pytest.approx(one.error_before)
    assert result.refit.error_after == result.error <= one.error_after
    assert relative_error(ffn, heldout) == pytest.approx(result.error, rel=1e-4)


@pytest.mark.parametrize("refit", [False, True])
def test_a_second_turn_that_does_not_help_leaves_the_first_one_s_values(
    refit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ffn = make_ffn(shared=5)
    fitting, heldout = make_tokens(ffn, 1200).split(1000)
    genuine, seen = fit_router, []

    def reversed_the_second_time(*args: object) -> None:
        seen.append((ffn.router.clone(), ffn.down.clone(), ffn.scale_a))
        genuine(*args)  # type: ignore[arg-type]
        if len(seen) == 2:
            ffn.router.neg_()

    once = make_ffn(shared=5)
    half = fitting.spread(500)
    replace(ALL, refit=refit)._turn(once, half, heldout, once.down.clone(), torch.float32, FIRST_TURN_DAMPING)
    monkeypatch.setattr(layer_fit, "fit_router", reversed_the_second_time)
    result = replace(ALL, refit=refit).apply(ffn, fitting, heldout)
    assert len(seen) == 2
    assert torch.equal(ffn.router, once.router)
    assert torch.equal(ffn.down, once.down)
    assert ffn.scale_a == once.scale_a
    assert (result.refit is not None) == refit
    assert relative_error(ffn, heldout) == pytest.approx(result.error, rel=1e-4)


def test_the_first_turn_does_with_half_of_the_tokens_and_one_damping(monkeypatch: pytest.MonkeyPatch) -> None:
    ffn, genuine, turns = make_ffn(shared=5), refit_down, []
    fitting, heldout = make_tokens(ffn, 1200).split(1000)

    def noted(ffn: FactoredFFN, tokens: Tokens, *args: object, **options: object) -> RefitResult:
        turns.append((len(tokens), options["damping"]))
        return genuine(ffn, tokens, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(layer_fit, "refit_down", noted)
    ALL.apply(ffn, fitting, heldout)
    assert turns == [(500, FIRST_TURN_DAMPING), (1000, None)]


def test_the_second_turn_helps_a_router_without_a_refit_too() -> None:
    """Few experts beside many others: the second router knows which ones will be there."""
    ffn, once = make_ffn(shared=5, top_k=3), make_ffn(shared=5, top_k=3)
    fitting, heldout = make_tokens(ffn, 1200).split(1000)
    fit_router(once, fitting)
    result = LayerFit(router=True).apply(ffn, fitting, heldout)
    assert result.refit is None
    assert result.error == relative_error(ffn, heldout) < relative_error(once, heldout)


def test_both_refits_are_pulled_toward_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    ffn = make_ffn(shared=5)
    source_DF = ffn.down.clone()
    fitting, heldout = make_tokens(ffn, 1200).split(1000)
    genuine, around = refit_down, []
    monkeypatch.setattr(
        layer_fit,
        "refit_down",
        lambda *args, **options: around.append(options["around_DF"]) or genuine(*args, **options),
    )
    ALL.apply(ffn, fitting, heldout)
    assert [bool(torch.equal(toward_DF, source_DF)) for toward_DF in around] == [True, True]


@pytest.mark.parametrize("top_k", [0, 4])
def test_where_nothing_is_routed_one_turn_is_enough(top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ffn = make_ffn(shared=5, top_k=top_k)
    fitting, heldout = make_tokens(ffn, 600).split(500)
    calls, genuine = [], refit_down
    monkeypatch.setattr(layer_fit, "refit_down", lambda *a, **o: calls.append(1) or genuine(*a, **o))
    ALL.apply(ffn, fitting, heldout)
    assert len(calls) == 1


def test_what_is_fitted_is_rounded_to_what_will_be_stored() -> None:
    ffn = make_ffn(shared=5)
    fitting, heldout = make_tokens(ffn, 1200).split(1000)
    result = ALL.apply(ffn, fitting, heldout, torch.bfloat16)
    assert torch.equal(ffn.router, ffn.router.bfloat16().float())
    assert relative_error(ffn, heldout) == pytest.approx(result.error, rel=1e-4)


def test_without_steps_the_layer_stays_as_it_is() -> None:
    ffn = make_ffn(shared=5)
    before = {name: value.clone() for name, value in ffn.named_parameters()}
    fitting, heldout = make_tokens(ffn, 600).split(500)
    assert LayerFit().apply(ffn, fitting, heldout) == FitResult(relative_error(ffn, heldout), None)
    assert all(torch.equal(value, before[name]) for name, value in ffn.named_parameters())
