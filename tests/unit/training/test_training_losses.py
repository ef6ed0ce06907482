"""Every loss against finite differences and plain loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from factorctl.config.shape import FactorShape
from factorctl.ffn import labels as teacher_labels
from factorctl.ffn.layer import FactoredFFN
from factorctl.ffn.paths import hidden_of_all
from factorctl.training import losses
from factorctl.training.head_losses import CHUNK_TOKENS, HeadTask, chunk_tokens, head_losses
from factorctl.training.presets import LossWeights

T, D, N, K, V = 6, 5, 4, 2, 7


def draw(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def labels(seed: int = 3) -> torch.Tensor:
    return draw(T, N, seed=seed).topk(K, dim=1).indices


def make_ffn(expert_size: int, shared_size: int = 0, biases: bool = False, top_k: int = K) -> FactoredFFN:
    shape = FactorShape(N, top_k, expert_size, shared_size)
    ffn = FactoredFFN(shape, D, "silu", gate_up_bias=biases, down_bias=biases, dtype=torch.float64)
    with torch.no_grad():
        for index, parameter in enumerate(ffn.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=index))
    return ffn


TARGETS = torch.tensor([1, 2, losses.IGNORED, 4, 5, 6])


@pytest.mark.parametrize(
    ("name", "loss", "size"),
    [
        ("par", lambda r: losses.par_loss(r, labels()), (T, N)),
        ("balance", lambda r: losses.balance_loss(r, labels()), (T, N)),
        ("z", losses.z_loss, (T, N)),
        ("lm", lambda logits: losses.lm_loss(logits, TARGETS), (T, V)),
        ("kd", lambda logits: losses.kd_loss(logits, draw(T, V, seed=9)), (T, V)),
        ("kd at temperature 2", lambda logits: losses.kd_loss(logits, draw(T, V, seed=9), 2.0), (T, V)),
        ("mse", lambda y: losses.mse_loss(y, draw(T, D, seed=9)), (T, D)),
    ],
)
def test_gradient_against_finite_differences(name: str, loss: object, size: tuple[int, ...]) -> None:
    assert gradcheck(loss, draw(*size).requires_grad_()), name


@pytest.mark.parametrize("expert_size", [3, D, 8], ids=["H < D: Gram", "H = D", "H > D: outputs"])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_distances_against_a_plain_loop(expert_size: int, share: float) -> None:
    hidden, down, target = draw(T, N, expert_size), draw(N, D, expert_size, seed=1), draw(T, D, seed=2)
    found = losses.par_distances(hidden, down, target, share)
    for token in range(T):
        for expert in range(N):
            output = down[expert] @ hidden[token, expert]
            whole = (output - share * target[token]).square().sum() - (share * target[token]).square().sum()
            assert found[token, expert] == pytest.approx(float(whole), abs=1e-10)


@pytest.mark.parametrize(("expert_size", "shared_size", "biases"), [(3, 0, False), (8, 0, False), (3, 2, True)])
@torch.no_grad()
def test_labels_against_a_plain_loop(expert_size: int, shared_size: int, biases: bool) -> None:
    """Expert by expert, neuron by neuron: the K with the least ||o_e - share (t - shared - bias)||^2."""
    ffn, x, t, share = make_ffn(expert_size, shared_size, biases), draw(T, D, seed=20), draw(T, D, seed=21), K / N
    found = losses.par_labels(ffn, x, t, share)
    for token in range(T):
        rest = t[token].clone()
        if shared_size:
            gate, up = (F.linear(x[token], ffn.shared_gate_up, ffn.shared_gate_up_bias)).chunk(2)
            rest -= ffn.down[:, :shared_size] @ (F.silu(gate) * up)
        if biases:
            rest -= ffn.down_bias
        distances = []
        for expert in range(N):
            bias = ffn.gate_up_bias[expert] if biases else None
            gate, up = F.linear(x[token], ffn.gate_up[expert], bias).chunk(2)
            first = shared_size + expert * expert_size
            output = ffn.down[:, first : first + expert_size] @ (F.silu(gate) * up)
            distances.append(float((output - share * rest).square().sum()))
        nearest = sorted(range(N), key=distances.__getitem__)[:K]
        assert sorted(found[token].tolist()) == sorted(nearest)


def test_labels_do_not_depend_on_the_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    ffn, x, t = make_ffn(3), draw(T, D, seed=20), draw(T, D, seed=21)
    whole = losses.par_labels(ffn, x, t, 0.5)
    monkeypatch.setattr(teacher_labels, "LABEL_CHUNK_TOKENS", 4)
    assert torch.equal(losses.par_labels(ffn, x, t, 0.5), whole)


def test_par_is_least_where_the_labels_share_the_probability() -> None:
    sharp = torch.full((T, N), -50.0, dtype=torch.float64).scatter(1, labels(), 0.0)
    assert float(losses.par_loss(sharp, labels())) == pytest.approx(math.log(K))
    assert float(losses.par_loss(draw(T, N), labels())) > math.log(K)


def test_balance_is_one_for_an_even_load_and_more_for_a_skewed_one() -> None:
    even = torch.tensor([[0, 1], [2, 3]])
    assert float(losses.balance_loss(torch.zeros(2, N), even)) == pytest.approx(1.0)
    skewed = torch.zeros(2, N).index_fill(1, torch.tensor([0, 1]), 50.0)
    assert float(losses.balance_loss(skewed, torch.tensor([[0, 1], [0, 1]]))) == pytest.approx(N / K)


def test_kd_is_zero_for_equal_logits_and_keeps_its_size_over_temperatures() -> None:
    logits = draw(T, V)
    assert float(losses.kd_loss(logits, logits.clone(), 3.0)) == pytest.approx(0.0, abs=1e-12)
    near = logits + 1e-3 * draw(T, V, seed=5)
    hot, hotter = (float(losses.kd_loss(near, logits, tau)) for tau in (50.0, 100.0))
    assert hot == pytest.approx(hotter, rel=0.05), "tau^2 undoes what 1/tau does to small differences"


def test_mse_is_one_for_no_output_and_does_not_depend_on_the_size_of_the_target() -> None:
    target = draw(T, D)
    assert float(losses.mse_loss(torch.zeros(T, D), target)) == pytest.approx(1.0)
    assert float(losses.mse_loss(0.9 * 1000 * target, 1000 * target)) == pytest.approx(0.01)


def test_half_precision_is_widened() -> None:
    assert losses.z_loss(draw(T, N).bfloat16()).dtype == torch.float32


def test_the_first_token_of_a_document_is_no_target() -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    ignored = losses.IGNORED
    assert losses.next_tokens(ids, torch.tensor([[0, 1, 2, 3]])).tolist() == [[6, 7, 8, ignored]]
    assert losses.next_tokens(ids, torch.tensor([[0, 1, 0, 1]])).tolist() == [[6, ignored, 8, ignored]]


def test_agreement_and_counts() -> None:
    chosen, wanted = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1, 0], [2, 1]])
    assert float(losses.agreement(chosen, wanted)) == pytest.approx(0.75)
    assert losses.expert_counts(chosen, 5).tolist() == [1, 1, 1, 1, 0]


@pytest.mark.parametrize("weights", [LossWeights(lm=1.0), LossWeights(kd=1.0), LossWeights(lm=0.3, kd=0.7)])
def test_head_losses_give_the_gradient_of_the_whole_logits(weights: LossWeights) -> None:
    """More tokens than one chunk, the last chunk not full."""
    tokens = CHUNK_TOKENS + 9
    head, teacher = draw(V, D, seed=1), draw(tokens, D, seed=2)
    targets = torch.arange(tokens) % V
    targets[::5] = losses.IGNORED
    student = draw(tokens, D).requires_grad_()
    found = head_losses(HeadTask(lambda h: h @ head.T, targets, teacher, weights, 2.0), student)
    (gradient,) = torch.autograd.grad(3 * found.total, student)
    lm = losses.lm_loss(student @ head.T, targets)
    kd = losses.kd_loss(student @ head.T, teacher @ head.T, 2.0)
    plain = weights.lm * lm + weights.kd * kd
    (expected,) = torch.autograd.grad(3 * plain, student)
    torch.testing.assert_close(gradient, expected)
    assert float(found.total.detach()) == pytest.approx(float(plain.detach()))
    assert float(found.lm.detach()) == pytest.approx(float(lm.detach()))


def test_a_chunk_of_logits_stays_below_what_the_allocator_gives_back() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [chunk_tokens(cpu, vocabulary) for vocabulary in (100, 49_152, 10**9)] == [CHUNK_TOKENS, 128, 1]
    assert chunk_tokens(cuda, 49_152) == CHUNK_TOKENS


def test_head_losses_without_weight_carry_no_gradient() -> None:
    student = draw(T, D).requires_grad_()
    task = HeadTask(lambda h: h @ draw(V, D).T, torch.arange(T), None, LossWeights(par=1.0), 1.0)
    assert not head_losses(task, student).total.requires_grad


def test_measuring_takes_the_teachers_own_loss() -> None:
    head, teacher, targets = draw(V, D, seed=1), draw(T, D, seed=2), torch.arange(T)
    task = HeadTask(lambda h: h @ head.T, targets, teacher, LossWeights(kd=1.0), 1.0)
    found = head_losses(task, draw(T, D), measuring=True)
    assert found.teacher_lm is not None
    assert float(found.teacher_lm) == pytest.approx(float(losses.lm_loss(teacher @ head.T, targets)))


def test_labels_from_what_the_teachers_neurons_give_are_the_same_while_gate_and_up_are() -> None:
    """With shared neurons and biases, in storage order, also where the down-projection has been refitted."""
    ffn = make_ffn(5, 6, biases=True)
    x, t = draw(9, D, seed=20), draw(9, D, seed=21)
    hidden = torch.cat([ffn.shared_hidden(x), hidden_of_all(x, ffn.experts).flatten(1)], dim=1)
    given = teacher_labels.distances_of_hidden(ffn, hidden, t, 0.7)
    torch.testing.assert_close(given, teacher_labels.distances_to_target(ffn, x, t, 0.7))
    assert torch.equal(teacher_labels.nearest(given, K), losses.par_labels(ffn, x, t, 0.7))
