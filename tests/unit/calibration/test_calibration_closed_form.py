"""Router, scale and refit: never worse than what they start from, and right where the answer is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from factorctl.calibration import closed_form
from factorctl.calibration.closed_form import (
    benefits,
    expert_load,
    fit_router,
    fit_scale,
    hidden_in_order,
    near_ties,
    output,
    refit_down,
    relative_error,
)
from factorctl.calibration.tokens import Tokens
from factorctl.config.shape import FactorShape
from factorctl.ffn.layer import FactoredFFN
from factorctl.ffn.ridge import RidgeMoments

D, N, H = 16, 4, 6


def make_ffn(*, shared: int = 0, top_k: int = 2, bias: bool = False, **options: Any) -> FactoredFFN:
    torch.manual_seed(0)
    ffn = FactoredFFN(FactorShape(N, top_k, H, shared), D, "silu", gate_up_bias=bias, down_bias=bias, **options)
    with torch.no_grad():
        for parameter in ffn.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))
    return ffn.requires_grad_(False)


def dense_target(ffn: FactoredFFN, x_TD: torch.Tensor) -> torch.Tensor:
    top_k, ffn.top_k = ffn.top_k, N
    try:
        return ffn(x_TD)
    finally:
        ffn.top_k = top_k


def make_tokens(ffn: FactoredFFN, count: int = 600) -> Tokens:
    x_TD = torch.randn(count, D, generator=torch.Generator().manual_seed(1))
    return Tokens(x_TD, dense_target(ffn, x_TD), torch.ones(count))


@pytest.mark.parametrize("top_k", [0, 1, 2, N])
@pytest.mark.parametrize("shared", [0, 5])
@pytest.mark.parametrize("bias", [False, True])
def test_benefit_is_the_drop_in_squared_error_beside_the_others_that_run(shared: int, bias: bool, top_k: int) -> None:
    ffn = make_ffn(shared=shared, bias=bias, top_k=top_k, gate="hard", scale_a=1.25 if 0 < top_k < N else 1.0).double()
    x_TD = torch.randn(7, D, dtype=torch.float64)
    t_TD = dense_target(ffn, x_TD)
    found_TN = benefits(ffn, Tokens(x_TD, t_TD, torch.ones(7, dtype=torch.float64)))
    for t, x in enumerate(x_TD):
        fixed = torch.zeros(D, dtype=torch.float64) if ffn.down_bias is None else ffn.down_bias.clone()
        if shared:
            gate, up = (ffn.shared_gate_up @ x + (ffn.shared_gate_up_bias if bias else 0)).split(shared)
            fixed += ffn.down[:, :shared] @ (torch.nn.functional.silu(gate) * up)
        outputs = []
        for e in range(N):
            gate, up = (ffn.gate_up[e] @ x + (ffn.gate_up_bias[e] if bias else 0)).split(H)
            first = shared + e * H
            outputs.append(ffn.scale_a * ffn.down[:, first : first + H] @ (torch.nn.functional.silu(gate) * up))
        chosen = set((ffn.router @ x).topk(top_k).indices.tolist())
        for e in range(N):
            left_TD = t_TD[t] - fixed - sum((outputs[other] for other in chosen - {e}), torch.zeros_like(fixed))
            drop = left_TD.square().sum() - (left_TD - outputs[e]).square().sum()
            assert float(found_TN[t, e]) == pytest.approx(float(drop), rel=1e-9)


def test_relative_error_weighs_tokens() -> None:
    ffn = make_ffn()
    tokens = make_tokens(ffn, 50)
    weight_T = torch.rand(50)
    wrong = ((ffn(tokens.x_TD) - tokens.t_TD).square().sum(1) * weight_T).sum()
    right = (tokens.t_TD.square().sum(1) * weight_T).sum()
    assert relative_error(ffn, Tokens(tokens.x_TD, tokens.t_TD, weight_T)) == pytest.approx(
        float((wrong / right).sqrt())
    )
    ffn.top_k = N
    assert relative_error(ffn, tokens) < 1e-6


@pytest.mark.parametrize("gate", ["softmax", "hard"])
@pytest.mark.parametrize("top_k", [0, 1, 2, N])
def test_activations_that_were_kept_give_what_the_layer_gives(top_k: int, gate: Any) -> None:
    """The activations come in the source's order, the layer stores them in its own."""
    ffn = make_ffn(shared=5, top_k=top_k, bias=True, gate=gate, scale_a=1.3 if top_k in (1, 2) else 1.0)
    ffn.neuron_ids.copy_(torch.randperm(5 + N * H, generator=torch.Generator().manual_seed(2)))
    tokens = make_tokens(ffn, 40)
    assert tokens.hidden_TF is None
    torch.testing.assert_close(output(ffn, tokens), ffn(tokens.x_TD), rtol=1e-5, atol=1e-5)
    back_F = torch.argsort(ffn.neuron_ids.long())
    kept = replace(tokens, hidden_TF=hidden_in_order(ffn, tokens)[:, back_F])
    torch.testing.assert_close(output(ffn, kept), ffn(tokens.x_TD), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(benefits(ffn, kept), benefits(ffn, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gate", ["softmax", "hard"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_fitted_router_beats_a_random_one(gate: Any, top_k: int) -> None:
    ffn = make_ffn(shared=5, top_k=top_k, gate=gate)
    tokens = make_tokens(ffn)
    fitting, heldout = tokens.split(500)
    before = relative_error(ffn, heldout)
    fit_router(ffn, fitting)
    assert torch.isfinite(ffn.router).all()
    assert relative_error(ffn, heldout) < before


def test_the_scale_is_the_least_squares_one() -> None:
    ffn = make_ffn(shared=5)
    tokens = make_tokens(ffn)
    best = fit_scale(ffn, tokens)
    assert ffn.scale_a == best
    at_best = relative_error(ffn, tokens)
    for other in (0.95 * best, 1.05 * best, 1.0):
        ffn.scale_a = other
        assert relative_error(ffn, tokens) >= at_best
    for top_k in (0, N):
        assert fit_scale(make_ffn(shared=5, top_k=top_k), tokens) == 1.0


@pytest.mark.parametrize(("shared", "top_k", "bias"), [(0, 2, False), (5, 2, True), (5, 0, True), (5, 1, False)])
def test_the_refit_lowers_the_held_out_error(shared: int, top_k: int, bias: bool) -> None:
    ffn = make_ffn(shared=shared, top_k=top_k, bias=bias)
    fitting, heldout = make_tokens(ffn, 1200).split(1000)
    before = relative_error(ffn, heldout)
    result = refit_down(ffn, fitting, heldout)
    assert result.kept
    assert result.error_before == pytest.approx(before)
    assert result.error_after < 0.99 * before
    assert relative_error(ffn, heldout) == pytest.approx(result.error_after, rel=1e-4)


@pytest.mark.parametrize(
    ("best", "walk"),
    [
        (0.01, [0.3, 1.0, 0.1, 0.03]),
        (0.09, [0.3, 1.0, 0.1, 0.03]),
        (0.3, [0.3, 1.0, 0.1]),
        (0.9, [0.3, 1.0, 3.0]),
        (9.0, [0.3, 1.0, 3.0]),
    ],
)
def test_the_search_for_a_damping_goes_where_the_error_falls(
    best: float, walk: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up or down from the middle, no further than it helps."""
    ffn, tried = make_ffn(), []
    genuine = RidgeMoments.solver

    def noted(self: RidgeMoments, around_IO: torch.Tensor | None = None) -> Callable[[float], torch.Tensor]:
        def solve(damping: float) -> torch.Tensor:
            tried.append(damping)
            return genuine(self, around_IO)(damping)

        return solve

    def error(*_: object) -> float:
        return abs(math.log(tried[-1] / best)) if tried else 10.0

    monkeypatch.setattr(RidgeMoments, "solver", noted)
    monkeypatch.setattr(closed_form, "_error_behind", error)
    fitting, heldout = make_tokens(ffn).split(500)
    result = refit_down(ffn, fitting, heldout)
    assert tried == pytest.approx(walk)
    assert result.damping == min(walk, key=lambda damping: abs(math.log(damping / best)))


def test_a_refit_that_does_not_help_keeps_the_values() -> None:
    ffn = make_ffn(top_k=N)
    original_DF = ffn.down.clone()
    fitting, heldout = make_tokens(ffn).split(500)
    noise = Tokens(fitting.x_TD, torch.randn(500, D), fitting.weight_T)
    result = refit_down(ffn, noise, heldout)
    assert not result.kept
    assert result.error_after == result.error_before
    assert torch.equal(ffn.down, original_DF)


def test_chunks_and_splits_hold_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("factorctl.calibration.tokens.CHUNK_TOKENS", 7)
    tokens = make_tokens(make_ffn(), 30)
    assert [len(chunk) for chunk in tokens.chunks()] == [7, 7, 7, 7, 2]
    first, rest = tokens.split(11)
    assert torch.equal(torch.cat([first.x_TD, rest.x_TD]), tokens.x_TD)
    assert len(rest.weight_T) == 19


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_router_serves_ordinary_tokens_where_a_few_have_massive_activations(top_k: int) -> None:
    """Inputs are normalised, so massive activations come from one direction that all neurons magnify."""
    ffn = make_ffn(shared=5, top_k=top_k)
    tokens = make_tokens(ffn, 2000)
    x_TD = tokens.x_TD.clone()
    x_TD[:, 0] = 0
    ordinary = Tokens(x_TD, dense_target(ffn, x_TD), tokens.weight_T)
    fit_router(ffn, ordinary)
    undisturbed = relative_error(ffn, ordinary)
    for rows in (ffn.gate_up, ffn.shared_gate_up):
        rows[..., 0] = 100 * rows[..., 0].abs()
    x_TD = x_TD.clone()
    x_TD[::100, 0] = 3 + torch.rand(20, generator=torch.Generator().manual_seed(3))
    disturbed = Tokens(x_TD, dense_target(ffn, x_TD), tokens.weight_T)
    assert float(disturbed.t_TD[0].norm()) > 1000 * float(disturbed.t_TD[1].norm()), "or nothing is massive"
    fit_router(ffn, disturbed)
    assert relative_error(ffn, ordinary) < 1.05 * undisturbed
    logits_TN = ffn.router_logits(ordinary.x_TD)
    assert near_ties(logits_TN, top_k) < 0.01
    torch.testing.assert_close(logits_TN.mean(1), torch.zeros(2000), atol=1e-5, rtol=0)


def test_near_ties_are_those_that_rounding_decides() -> None:
    logits_TN = torch.tensor([[3.0, 2.0, 1.0], [3.0, 1.0 + 1e-6, 1.0], [1.0, 1.0, 0.0], [0.5, 2.0, 0.0]])
    assert near_ties(logits_TN, 1) == 0.25
    assert near_ties(logits_TN, 2) == 0.25


def test_the_load_is_counted_per_expert() -> None:
    logits_TN = torch.tensor([[3.0, 2.0, 1.0], [3.0, 1.0, 2.0], [1.0, 0.0, 2.0]])
    assert expert_load(logits_TN, 1) == [0.6667, 0.0, 0.3333]
    assert expert_load(logits_TN, 2) == [1.0, 0.3333, 0.6667]
