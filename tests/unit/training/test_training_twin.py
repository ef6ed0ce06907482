"""Teacher and student in one model: identity, what is shared, what is trained, what checkpointing recomputes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DenseSource
from support.tiny import calibrated, factorize_quietly, some_ids, spy_on_routers, weights_only
from support.training import LENGTH, batch, distiller

import factorctl
from factorctl.errors import ResourceError
from factorctl.ffn.layer import FactoredFFN
from factorctl.models.building import decoder_layers, factored_ffns
from factorctl.models.loading import load_dense
from factorctl.training import teacher as teacher_module
from factorctl.training import twin_ffn
from factorctl.training.optimizers import choose_trained
from factorctl.training.presets import LossWeights
from factorctl.training.teacher import (
    QuantisedTeacher,
    own_tensors,
    require_cuda_for,
    teacher_ffn,
)
from factorctl.training.twin_ffn import twins


@pytest.fixture(scope="module")
def checkpoints(
    dense_source: DenseSource, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Factorized tiny models: plain, with biases, and with shared neurons, fitted scale and refit."""
    root = tmp_path_factory.mktemp("factored")
    made = {"plain": root / "plain", "biases": root / "biases", "refit": root / "refit"}
    factorize_quietly(weights_only(dense_source(), made["plain"], top_k=2))
    factorize_quietly(weights_only(dense_source("llama-biases"), made["biases"], top_k=2))
    factorize_quietly(calibrated(dense_source(), made["refit"], text_file, top_k=2))
    return made


@pytest.mark.parametrize("case", ["plain", "biases", "refit"])
def test_with_all_experts_on_the_student_is_the_teacher(checkpoints: dict[str, Path], case: str) -> None:
    report = distiller(checkpoints[case], top_k=4)(*batch(), measuring=True)
    assert float(report.lm) == pytest.approx(float(report.teacher_lm), rel=1e-6)
    assert float(report.kd) == pytest.approx(0.0, abs=1e-6)
    assert report.agreement is None
    assert report.load_LN is None


@pytest.mark.parametrize("case", ["plain", "biases", "refit"])
def test_the_teacher_is_the_dense_model_whatever_the_student_does(
    checkpoints: dict[str, Path], dense_source: DenseSource, case: str
) -> None:
    """A true dense forward: also behind the first layer, also when the student's values are others."""
    source = dense_source("llama-biases" if case == "biases" else "llama")
    model = distiller(checkpoints[case], source=source)
    with torch.no_grad():
        for twin in twins(model.model):
            twin.student.down.mul_(3.0)
    ids, positions = batch()
    report = model(ids, positions, measuring=True)
    dense = load_dense(source)
    loss = torch.nn.functional.cross_entropy(dense(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert float(report.teacher_lm) == pytest.approx(float(loss), rel=1e-5)
    assert abs(float(report.lm) - float(loss)) > 1e-3


def test_labels_come_from_the_teachers_input_and_output(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the dense model's own hooks, in the last layer, where the student's stream is another one."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    genuine = twin_ffn.distances_to_target

    def spy(ffn: FactoredFFN, x: torch.Tensor, t: torch.Tensor, share: float) -> torch.Tensor:
        seen.append((x, t))
        return genuine(ffn, x, t, share)

    monkeypatch.setattr(twin_ffn, "distances_to_target", spy)
    ids, positions = batch()
    distiller(checkpoints["plain"])(ids, positions)
    dense = factorctl.load(checkpoints["plain"], top_k=4)
    caught: list[tuple[torch.Tensor, torch.Tensor]] = []
    list(factored_ffns(dense))[-1].register_forward_hook(lambda _m, x, y: caught.append((x[0], y)))
    with torch.no_grad():
        dense(ids)
    torch.testing.assert_close(seen[-1][0], caught[0][0].flatten(0, 1))
    torch.testing.assert_close(seen[-1][1], caught[0][1].flatten(0, 1))


def test_router_losses_train_routers_and_nothing_below_them(checkpoints: dict[str, Path]) -> None:
    model = distiller(checkpoints["plain"], LossWeights(par=1.0), train="router")
    model(*batch()).total.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {f"model.model.layers.{layer}.mlp.student.router" for layer in range(2)}


def test_a_softmax_gate_gives_the_router_a_gradient_and_a_hard_one_does_not(checkpoints: dict[str, Path]) -> None:
    model = distiller(checkpoints["plain"], LossWeights(kd=1.0))
    model(*batch()).total.backward()
    assert all(float(twin.student.router.grad.abs().sum()) > 0 for twin in twins(model.model))
    for twin in twins(model.model):
        twin.student.gate = "hard"
    choose_trained((twin.student for twin in twins(model.model)), "all", LossWeights(kd=1.0))
    assert not any(twin.student.router.requires_grad for twin in twins(model.model))


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("refit", "gate_up"),
        ("refit", "shared_gate_up"),
        ("refit", "down"),
        ("plain", "router"),
        ("plain", "sharpness"),
    ],
)
def test_a_whole_step_against_finite_differences(checkpoints: dict[str, Path], case: str, name: str) -> None:
    """Every loss on, along a random direction of each kind of parameter.

    transformers computes norms, and the gate its softmax, in float32 whatever the model's dtype: that is why the steps
    are not smaller and the bound is not tighter than they are. The losses alone are checked in float64.
    """
    model = distiller(checkpoints[case]).double()
    model.options.compute_dtype = torch.float64
    model(*batch()).total.backward()
    twin = twins(model.model)[0]
    parameter = twin.sharpness if name == "sharpness" else getattr(twin.student, name)
    direction = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    step = 1e-5 if name == "router" else 1e-4  # a larger one changes a token's choice
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter.add_(sign * step * direction)
            values.append(float(model(*batch()).total))
            parameter.sub_(sign * step * direction)
    slope = (values[0] - values[1]) / (2 * step)
    assert slope == pytest.approx(float((parameter.grad * direction).sum()), rel=0.02, abs=1e-3)


def test_frozen_values_are_held_once(checkpoints: dict[str, Path], dense_source: DenseSource) -> None:
    model = distiller(checkpoints["plain"], train="router")
    for twin in twins(model.model):
        assert twin.teacher.down is twin.student.down
        assert twin.teacher.gate_up is twin.student.gate_up
    trained = distiller(checkpoints["plain"])
    for twin in twins(trained.model):
        assert twin.teacher.down.data_ptr() != twin.student.down.data_ptr()
    refit = distiller(checkpoints["refit"], train="router", source=dense_source())
    for twin in twins(refit.model):
        assert twin.teacher.gate_up is twin.student.gate_up, "the refit changed the down-projection alone"
        assert twin.teacher.down is not twin.student.down
    static = distiller(checkpoints["refit"], top_k=0)
    for twin in twins(static.model):
        assert twin.teacher.gate_up is twin.student.gate_up, "at K = 0 routed neurons do not learn"


def test_gradient_checkpointing_gives_the_same_gradients_and_runs_layers_again(checkpoints: dict[str, Path]) -> None:
    def gradients(checkpointing: bool) -> tuple[list[torch.Tensor], int]:
        model = distiller(checkpoints["refit"])
        runs = 0

        def count(*_: object) -> None:
            nonlocal runs
            runs += 1

        if checkpointing:
            enable = getattr(model.model, "activation_checkpointing_enable", model.model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
            model.model.train()
        decoder_layers(model.model)[0].mlp.register_forward_pre_hook(count)
        model(*batch()).total.backward()
        return [p.grad for p in model.parameters() if p.grad is not None], runs

    (plain, once), (again, twice) = gradients(False), gradients(True)
    assert (once, twice) == (2, 3), "teacher and student; and the student again"
    for ours, theirs in zip(again, plain, strict=True):
        assert torch.equal(ours, theirs)


def test_bfloat16_computes_with_a_float32_router(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes = spy_on_routers(monkeypatch)
    model = distiller(checkpoints["refit"], dtype=torch.bfloat16)
    report = model(*batch())
    report.total.backward()
    assert dtypes == {(torch.bfloat16, torch.float32)}
    exact = distiller(checkpoints["refit"])(*batch())
    assert float(report.total) == pytest.approx(float(exact.total), rel=0.05)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


def test_documents_in_a_block_do_not_see_each_other(checkpoints: dict[str, Path]) -> None:
    model = distiller(checkpoints["plain"])
    ids = some_ids(1, LENGTH)
    positions = torch.cat([torch.arange(10), torch.arange(LENGTH - 10)])[None]
    with torch.no_grad():
        packed = model._hidden(ids, positions)[10:]
        alone = model._hidden(ids[:, 10:], positions[:, 10:])
    torch.testing.assert_close(packed, alone)


def test_a_step_draws_no_random_numbers(checkpoints: dict[str, Path]) -> None:
    model = distiller(checkpoints["refit"])
    before = torch.get_rng_state()
    model(*batch()).total.backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_quantised_teacher_is_refused_on_a_cpu() -> None:
    with pytest.raises(ResourceError, match="--teacher-quant 4bit needs a CUDA device; this run computes on cpu"):
        require_cuda_for("4bit", torch.device("cpu"))
    require_cuda_for("bf16", torch.device("cpu"))


def _relative_error(path: Path, storage: Any, device: str) -> float:
    """Of the worst layer's quantised teacher against the exact one."""
    errors = []
    for student in factored_ffns(factorctl.load(path, dtype=torch.float32, device=device)):
        exact = teacher_ffn(student, own_tensors(student), "none", torch.float32)
        x = torch.randn(64, student.hidden_size, generator=torch.Generator().manual_seed(0)).to(device)
        with torch.no_grad():
            near = QuantisedTeacher(student, own_tensors(student), storage)(x).float()
            errors.append(float((near - exact(x)).norm() / exact(x).norm()))
    return max(errors)


def _plain_linear(weight: torch.Tensor, bias: torch.Tensor | None, *_: object) -> torch.nn.Linear:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=torch.bfloat16)
    linear.weight.data = weight.bfloat16()
    if bias is not None:
        linear.bias.data = bias.bfloat16()
    return linear


@pytest.mark.parametrize("case", ["plain", "biases", "refit"])
def test_a_quantised_teacher_has_every_row_in_its_place(
    checkpoints: dict[str, Path], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_module, "_bnb_linear", _plain_linear)
    assert _relative_error(checkpoints[case], "4bit", "cpu") < 0.02


def test_a_four_bit_teacher_is_near_the_exact_one(checkpoints: dict[str, Path]) -> None:
    """The tiny model's random weights suffer more from NF4 than trained ones do; a wrong layout gives 1.4."""
    assert _relative_error(checkpoints["refit"], "4bit", "cpu") < 0.6


@pytest.mark.gpu
@pytest.mark.parametrize("storage", ["8bit", "4bit"])
def test_a_quantised_teacher_on_a_gpu(checkpoints: dict[str, Path], storage: str) -> None:
    assert _relative_error(checkpoints["refit"], storage, "cuda") < 0.6
