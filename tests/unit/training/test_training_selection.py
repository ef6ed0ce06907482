"""Routers at unit scale, what all experts tell them, fits in closed form, layers that heal alone, and Muon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DenseSource
from support.training import batch, distiller

from factorctl.config.finetune import FinetuneConfig
from factorctl.config.shape import FactorShape
from factorctl.ffn.layer import FactoredFFN
from factorctl.ffn.ridge import RidgeMoments
from factorctl.ffn.routing import logit_spread
from factorctl.models.building import decoder_layers
from factorctl.training.losses import agreement, par_loss
from factorctl.training.muon import Muon, blocks_of, orthogonal
from factorctl.training.optimizers import make_optimizers
from factorctl.training.presets import LossWeights, recipe_of
from factorctl.training.selection import MIN_SHARPNESS, REFRESH_DAMPING, keep_order, refresh_routers, to_unit_spread
from factorctl.training.straight_through import as_if_all_ran
from factorctl.training.twin_ffn import TwinFFN, twins


class Alone:
    """What accelerate's accelerator does in one process."""

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        return tensor


def draw(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1.0, 1e-3, 300.0])
def test_a_router_at_unit_scale_is_the_stored_one_to_the_last_bit(checkpoint: Path, size: float) -> None:
    model = distiller(checkpoint)
    for twin in twins(model.model):
        twin.student.router.data.mul_(size)
    stored = [twin.student.router.detach().clone() for twin in twins(model.model)]
    before = float(model(*batch()).lm.detach())
    to_unit_spread(model, *batch(), Alone())
    inputs = [seen_by(model, twin) for twin in twins(model.model)]
    for twin, router, x_TD in zip(twins(model.model), stored, inputs, strict=True):
        assert torch.equal(twin.stored_router(), router)
        assert 0.7 <= float(logit_spread(x_TD @ twin.selection().detach().T)) <= 1.42
    assert float(model(*batch()).lm.detach()) == before


@torch.no_grad()
def seen_by(model: Any, twin: TwinFFN) -> torch.Tensor:
    """The inputs of one layer in the student's pass."""
    caught: list[torch.Tensor] = []
    hook = twin.register_forward_pre_hook(lambda _, x: caught.append(x[0].flatten(0, -2)))
    model(*batch())
    hook.remove()
    return caught[-1]  # the teacher's pass comes first


@pytest.mark.parametrize("size", [0.01, 30.0])
def test_a_step_moves_a_logit_by_the_routers_rate_however_large_the_inputs_are(checkpoint: Path, size: float) -> None:
    model = distiller(checkpoint, LossWeights(par=1.0), train="router")
    for block in decoder_layers(model.model):
        block.post_attention_layernorm.weight.data.fill_(size)
    to_unit_spread(model, *batch(), Alone())
    (routers,) = make_optimizers(model, recipe_of(FinetuneConfig(tokens=1, router_lr=0.1), 0.5))
    inputs = [seen_by(model, twin) for twin in twins(model.model)]
    before = [x_TD @ twin.selection().detach().T for x_TD, twin in zip(inputs, twins(model.model), strict=True)]
    model(*batch()).total.backward()
    routers.step()
    for x_TD, twin, logits_TN in zip(inputs, twins(model.model), before, strict=True):
        moved = (x_TD @ twin.selection().detach().T - logits_TN).abs()
        assert 0.01 < float(moved.median()) < float(moved.max()) < 0.3


def test_the_losses_of_routers_do_not_depend_on_how_even_the_gates_are(checkpoint: Path) -> None:
    """With near even gates, their logits a thousandth, cross-entropy would be log N and its gradient nothing."""
    found = []
    for size in (1.0, 2.0**-10):
        model = distiller(checkpoint, LossWeights(kd=1.0, par=1.0), learns_sharpness=False)
        for twin in twins(model.model):
            twin.student.router.data.mul_(size)
        to_unit_spread(model, *batch(), Alone())
        for twin in twins(model.model):
            twin.student.down.data[:, twin.student.shape.shared_size :] = 0.0  # gates no longer change the stream
        report = model(*batch())
        report.total.backward()
        found.append((float(report.par), twins(model.model)[0].student.router.grad))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1])


def test_the_temperature_is_that_of_the_routers_own_losses_alone(checkpoint: Path) -> None:
    plain, cooler = (distiller(checkpoint, router_temperature=tau)(*batch()) for tau in (1.0, 0.5))
    assert float(plain.par) != pytest.approx(float(cooler.par), rel=1e-4)
    assert float(plain.lm) == float(cooler.lm)
    assert float(plain.agreement) == float(cooler.agreement)


def test_sharpness_learns_where_the_output_depends_on_it(checkpoint: Path) -> None:
    def learns(weights: LossWeights, **options: Any) -> bool:
        return twins(distiller(checkpoint, weights, **options).model)[0].sharpness.requires_grad

    assert learns(LossWeights(kd=1.0))
    assert not learns(LossWeights(par=1.0)), "no loss on outputs"
    assert not learns(LossWeights(kd=1.0), top_k=1), "one chosen expert has gate 1"
    assert not learns(LossWeights(kd=1.0), train="experts")
    assert not learns(LossWeights(kd=1.0), learns_sharpness=False)


def test_a_sharpness_stays_above_0(checkpoint: Path) -> None:
    model = distiller(checkpoint)
    for twin in twins(model.model):
        twin.sharpness.data.fill_(-1.0)
    keep_order(twins(model.model))
    assert [twin.sharpness.item() for twin in twins(model.model)] == [MIN_SHARPNESS] * 2


def test_a_choice_learns_from_all_experts_as_a_loop_says() -> None:
    """R + P - stopgrad(P) token by token and expert by expert, in float64."""
    tokens, experts, size, width = 5, 4, 3, 6
    hidden_TNH, down_DR = draw(tokens, experts, size), draw(width, experts * size, seed=1)
    logits_TN, y_TD, wanted_TD = (draw(tokens, n, seed=n) for n in (experts, width, width + 1))
    wanted_TD = wanted_TD[:, :width]
    logits_TN.requires_grad_()
    y_TD.requires_grad_()
    y = as_if_all_ran(y_TD, 2 * logits_TN.softmax(-1), hidden_TNH, down_DR)
    assert torch.equal(y, y_TD)
    ours = torch.autograd.grad((y - wanted_TD).square().sum(), (logits_TN, y_TD))
    rows = []
    for t in range(tokens):
        p_N = 2 * logits_TN[t].softmax(-1)
        row_D = y_TD[t]
        for e in range(experts):
            o_D = down_DR[:, e * size : (e + 1) * size] @ hidden_TNH[t, e]
            row_D = row_D + (p_N[e] - p_N[e].detach()) * o_D
        rows.append(row_D)
    theirs = torch.autograd.grad((torch.stack(rows) - wanted_TD).square().sum(), (logits_TN, y_TD))
    for gradient, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, expected)


def test_straight_through_changes_no_output_and_moves_a_choice_that_even_gates_would_not(refitted: Path) -> None:
    def gradient(through: bool) -> tuple[float, torch.Tensor]:
        model = distiller(refitted, LossWeights(kd=1.0), straight_through=through)
        to_unit_spread(model, *batch(), Alone())
        for twin in twins(model.model):
            twin.sharpness.data.fill_(2.0**-10)
        report = model(*batch())
        report.total.backward()
        return float(report.total.detach()), twins(model.model)[1].student.router.grad

    (plain, weak), (same, strong) = gradient(False), gradient(True)
    assert same == pytest.approx(plain, rel=1e-6)
    assert float(strong.norm()) > 100 * float(weak.norm())


@pytest.mark.parametrize("target", ["labels", "benefits"])
def test_a_refresh_finds_what_a_linear_map_can_and_leaves_the_gates_as_unequal(checkpoint: Path, target: Any) -> None:
    model = distiller(checkpoint, refresh_target=target, router_temperature=0.5)
    to_unit_spread(model, *batch(), Alone())
    twin = twins(model.model)[0]
    x_TD, truth_ND = draw(20_000, 32).float(), draw(4, 32, seed=1).float()
    wanted_TN = x_TD @ (truth_ND - truth_ND.mean(0)).T

    def inequality() -> float:
        return float((x_TD @ twin.stored_router().detach().T).var(dim=1, unbiased=False).sum())

    twin.moments.add(x_TD, wanted_TN)
    before = inequality()
    refresh_routers([twin])
    found_TN = x_TD @ twin.selection().detach().T
    assert float(agreement(found_TN.topk(2).indices, wanted_TN.topk(2).indices)) > 0.99
    assert inequality() == pytest.approx(before, rel=1e-4)
    if target == "labels":
        predicted_TN = wanted_TN / (1 + REFRESH_DAMPING)  # of inputs of unit covariance
        torch.testing.assert_close(found_TN, 0.5 * 2 * predicted_TN, atol=0.3, rtol=0.02)  # temperature N/K times that


def test_a_fit_to_labels_has_the_scale_of_least_cross_entropy() -> None:
    """Labels that depend weakly on the input: no other scale of the fit, by a fifth or more, is better."""
    x_TD, truth_ND = draw(20_000, 6), 0.1 * draw(4, 6, seed=1)
    noise_TN = -torch.log(-torch.log(torch.rand(20_000, 4, generator=torch.Generator().manual_seed(2)).double()))
    labels_TK = (x_TD @ truth_ND.T + noise_TN).topk(1).indices
    moments = RidgeMoments(6, 4, torch.device("cpu"))
    moments.add(x_TD.float(), (torch.zeros(20_000, 4).scatter_(1, labels_TK, 1.0) - 0.25))
    logits_TN = x_TD.float() @ (4 * moments.solve(1e-3))
    losses = {factor: float(par_loss(factor * logits_TN, labels_TK)) for factor in (0.5, 0.8, 1.0, 1.25, 2.0)}
    assert min(losses, key=losses.__getitem__) == 1.0


@pytest.mark.parametrize("target", ["labels", "benefits"])
def test_layers_collect_while_they_train_and_a_refresh_raises_agreement(refitted: Path, target: Any) -> None:
    model = distiller(refitted, refresh_target=target)
    for twin in twins(model.model):
        torch.nn.init.normal_(twin.student.router, generator=torch.Generator().manual_seed(0))
    before = float(model(*batch(), measuring=True).agreement)
    layers = twins(model.model)
    collected = layers[0].moments.upper_II.clone()
    assert float(collected.trace()) > 0
    with torch.no_grad():
        model(*batch(), measuring=True)
    assert torch.equal(layers[0].moments.upper_II, collected), "a measurement is not training"
    refresh_routers(layers)
    with torch.no_grad():
        assert float(model(*batch(), measuring=True).agreement) > before


def test_labels_that_no_loss_uses_are_not_computed(checkpoint: Path) -> None:
    model = distiller(checkpoint, LossWeights(kd=1.0))
    report = model(*batch())
    assert report.agreement is None
    assert report.par is None
    assert model(*batch(), measuring=True).agreement is not None


def test_a_layer_that_heals_learns_its_own_output_on_its_own_input(refitted: Path) -> None:
    """Against each layer taken out of the model; neither the layers below nor the head are asked."""
    model = distiller(refitted, LossWeights(kd=1.0))
    with torch.no_grad():
        for twin in twins(model.model):
            twin.student.down.mul_(0.7)
    inputs = [seen_by(model, twin) for twin in twins(model.model)]
    report = model(*batch(), healing=True)
    assert report.lm is None
    report.total.backward()
    found = [{n: p.grad.clone() for n, p in t.named_parameters() if p.grad is not None} for t in twins(model.model)]
    model.zero_grad()
    losses = []
    for twin, x_TD in zip(twins(model.model), inputs, strict=True):
        t_TD = twin.teacher(x_TD).detach()
        wrong = (twin.student(x_TD) - t_TD).square().sum(1) / t_TD.norm(dim=1)
        losses.append(wrong.sum() / t_TD.norm(dim=1).sum())
    torch.stack(losses).mean().backward()
    assert float(report.mse) == pytest.approx(float(torch.stack(losses).mean().detach()), rel=1e-5)
    for twin, own in zip(twins(model.model), found, strict=True):
        for name in ("gate_up", "down", "shared_gate_up"):
            torch.testing.assert_close(own[f"student.{name}"], twin.student.get_parameter(name).grad)


def muon_layer() -> FactoredFFN:
    ffn = FactoredFFN(FactorShape(3, 1, 4, 6), 8, "silu", gate_up_bias=True)
    for seed, parameter in enumerate(ffn.parameters()):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(seed))
    return ffn


def test_muon_steps_each_block_as_torchs_own_does() -> None:
    """Two steps, so that momentum counts. torch iterates in bfloat16, hence the bound."""
    ffn = muon_layer()
    blocks = blocks_of(ffn)
    assert {id(p) for p in blocks} == {id(ffn.gate_up), id(ffn.shared_gate_up), id(ffn.down)}
    theirs = {p: [m.detach().clone() for b in cut(p) for m in b] for p, cut in blocks.items()}
    assert [len(copies) for copies in theirs.values()] == [6, 4, 2], "gate and up of three experts; down; shared"
    flat = [copy for copies in theirs.values() for copy in copies]
    reference = torch.optim.Muon(flat, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    ours = Muon(blocks, lr=0.01, weight_decay=0.1)
    for step in range(2):
        for seed, (parameter, cut) in enumerate(blocks.items()):
            parameter.grad = draw(*parameter.shape, seed=10 * step + seed).float()
            pieces = [matrix for block in cut(parameter.grad) for matrix in block]
            for copy, piece in zip(theirs[parameter], pieces, strict=True):
                copy.grad = piece.clone()
        ours.step()
        reference.step()
    for parameter, cut in blocks.items():
        pieces = [matrix for block in cut(parameter.detach()) for matrix in block]
        for copy, piece in zip(theirs[parameter], pieces, strict=True):
            torch.testing.assert_close(piece, copy, atol=5e-4, rtol=0)


@pytest.mark.parametrize("size", [(2, 5, 9), (2, 9, 5)])
def test_orthogonal_brings_singular_values_near_1(size: tuple[int, ...]) -> None:
    values = torch.linalg.svdvals(orthogonal(draw(*size)))
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.3


def test_muon_takes_the_matrices_and_adamw_the_rest() -> None:
    ffn = muon_layer()
    recipe = recipe_of(FinetuneConfig(tokens=1, optimizer="muon"), 0.5)
    holder = torch.nn.ModuleDict({"mlp": ffn})
    matrices, rest, routers = make_optimizers(holder, recipe)
    assert isinstance(matrices, Muon)
    assert [p.dim() for group in rest.param_groups for p in group["params"]] == [2, 1], "biases"
    assert isinstance(routers, torch.optim.AdamW)
    assert routers.param_groups[0]["params"] == [ffn.router]


def test_labels_from_the_teachers_neurons_are_the_students_own_at_first(
    refitted: Path, dense_source: DenseSource
) -> None:
    """Also after a refit, which changes the down-projection alone; not once gate and up rows have moved."""

    def par(source: Any, *, moved: bool) -> float:
        model = distiller(refitted, source=dense_source(), labels_from=source)
        for twin in twins(model.model):
            if moved:
                twin.student.gate_up.data.mul_(
                    1 + 0.5 * torch.randn(4, 1, 1, generator=torch.Generator().manual_seed(0))
                )
        return float(model(*batch()).par.detach())

    assert par("teacher", moved=False) == pytest.approx(par("student", moved=False), rel=1e-6)
    assert par("teacher", moved=True) != pytest.approx(par("student", moved=True), rel=1e-4)
