"""Presets, what is trained, optimisers, schedule, batches, and the watch for dead experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from factorctl.config.finetune import FinetuneConfig
from factorctl.config.shape import FactorShape
from factorctl.errors import UsageError
from factorctl.ffn.layer import FactoredFFN
from factorctl.progress import SilentProgress
from factorctl.training import load_watch
from factorctl.training.load_watch import LoadWatch, dead_experts
from factorctl.training.metrics import MetricsFile, draw_training
from factorctl.training.optimizers import Schedule, choose_trained, make_optimizers, set_learning_rate
from factorctl.training.presets import LossWeights, batch_tokens_of, recipe_of


def recipe(active: float = 0.5, **options: Any) -> Any:
    return recipe_of(FinetuneConfig(tokens=1000, **options), active)


def test_factorllm_is_the_published_recipe() -> None:
    paper = recipe(preset="factorllm")
    assert (paper.optimizer, paper.lr, paper.router_lr, paper.betas) == ("adam", 4e-5, 4e-5, (0.9, 0.95))
    assert (paper.gate, paper.scale, paper.label_share) == ("hard", "paper", "paper")
    assert paper.weights == LossWeights(lm=1.0, par=0.05)
    assert batch_tokens_of(paper, 10_000_000, 512) == 1024


def test_options_override_a_preset_one_by_one() -> None:
    changed = recipe(preset="factorllm", loss_weights={"kd": 0.5, "par": 0.0}, gate="softmax", lr=1e-3)
    assert changed.weights == LossWeights(lm=1.0, par=0.0, kd=0.5)
    assert (changed.gate, changed.scale) == ("softmax", "paper")
    assert recipe(lr=1e-3).router_lr == recipe().router_lr, "routers are trained at a scale of their own"
    assert recipe(selection="stored").selection == "stored"


def test_the_default_batch_grows_with_the_budget() -> None:
    sizes = [batch_tokens_of(recipe(), tokens, 1024) for tokens in (60_000, 640_000, 40_000_000)]
    assert sizes == [1024, 2500, 32_768]
    assert batch_tokens_of(recipe(), 60_000, 4096) == 4096, "a batch holds a sequence"
    assert batch_tokens_of(recipe(batch_tokens=512), 40_000_000, 1024) == 512


def test_the_default_rate_is_higher_where_less_is_active() -> None:
    assert [recipe(active).lr for active in (0.25, 0.5, 0.75)] == pytest.approx([1e-3, 5e-4, 3.333e-4], rel=1e-3)
    assert recipe(0.25, lr=2e-4).lr == 2e-4
    assert recipe(0.25, preset="factorllm").lr == 4e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_weights": {"dk": 1.0}}, "--loss names 'dk', which is no loss\nHint: known: balance, kd"),
        ({"loss_weights": {"kd": -1.0}}, "--loss kd=-1 is no weight"),
        ({"loss_weights": {"lm": 0.0, "kd": 0.0, "par": 0.0}}, "every loss that teaches has weight 0"),
        ({"lr": 0.0}, "--lr 0 is out of range"),
        ({"temperature": -1.0}, "--temperature -1 is out of range"),
        ({"weight_decay": -0.1}, "--weight-decay -0.1 is out of range"),
    ],
)
def test_bad_recipes_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as refused:
        recipe(**options)
    assert message in str(refused.value)


def ffn(top_k: int = 2, gate: Any = "softmax", hidden: int = 8) -> FactoredFFN:
    made = FactoredFFN(FactorShape(4, top_k, 4, 8), hidden, "silu", gate=gate)
    nn.init.normal_(made.router)
    return made


def trained(module: FactoredFFN, train: Any, **weights: float) -> set[str]:
    choose_trained([module], train, LossWeights(**weights))
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


EXPERTS = {"gate_up", "shared_gate_up", "down"}


def test_only_what_a_loss_reaches_is_trained() -> None:
    assert trained(ffn(), "all", kd=1.0) == EXPERTS | {"router"}
    assert trained(ffn(), "experts", kd=1.0) == EXPERTS
    assert trained(ffn(), "router", kd=1.0) == {"router"}
    assert trained(ffn(), "all", par=1.0) == {"router"}
    assert trained(ffn(gate="hard"), "all", kd=1.0) == EXPERTS
    assert trained(ffn(gate="hard"), "all", kd=1.0, par=1.0) == EXPERTS | {"router"}
    assert trained(ffn(top_k=1), "all", kd=1.0) == EXPERTS, "one chosen expert has gate 1 whatever the logits"
    assert trained(ffn(top_k=4), "all", kd=1.0, par=1.0) == EXPERTS
    assert trained(ffn(top_k=0), "all", kd=1.0, par=1.0) == {"shared_gate_up", "down"}


def test_a_run_in_which_nothing_would_learn_is_refused() -> None:
    with pytest.raises(UsageError, match="--train router leaves nothing that these losses, gate and top-k would teach"):
        trained(ffn(gate="hard"), "router", kd=1.0)


def test_the_schedule_counts_tokens() -> None:
    schedule = Schedule(tokens=1000, warmup_tokens=100, final_fraction=0.1)
    assert schedule.factor(50) == pytest.approx(0.5)
    assert schedule.factor(100) == pytest.approx(1.0)
    assert schedule.factor(550) == pytest.approx(0.55)
    assert schedule.factor(1000) == pytest.approx(0.1)
    assert schedule.factor(2000) == pytest.approx(0.1)


class Holder(nn.Module):
    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.mlp = ffn(hidden=hidden)
        choose_trained([self.mlp], "all", LossWeights(kd=1.0))


def rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


def test_routers_have_a_rate_of_their_own_and_no_decay() -> None:
    paper = recipe(preset="factorllm", lr=1e-3, router_lr=1e-2)
    experts, routers = make_optimizers(Holder(), paper)
    set_learning_rate([experts, routers], 0.5)
    assert (rates(experts), rates(routers)) == ([5e-4], [5e-3])
    experts, routers = make_optimizers(Holder(), recipe(weight_decay=0.3))
    assert (experts.param_groups[0]["weight_decay"], routers.param_groups[0]["weight_decay"]) == (0.3, 0.0)
    assert [p.shape for p in routers.param_groups[0]["params"]] == [(4, 8)]


def test_eight_bit_adamw_keeps_the_routers_state_in_float32() -> None:
    holder = Holder(hidden=2048)
    experts, routers = make_optimizers(holder, recipe(optimizer="adamw-8bit"))
    for parameter in holder.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = holder.mlp.down.detach().clone()
    experts.step()
    routers.step()
    assert experts.state[holder.mlp.down]["state1"].dtype == torch.uint8
    assert holder.mlp.router.numel() > 4096, "large enough that bitsandbytes alone would quantise it"
    assert routers.state[holder.mlp.router]["exp_avg"].dtype == torch.float32
    assert not torch.equal(holder.mlp.down, before)


def test_a_dead_expert_is_named_once_with_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_watch, "WINDOW_TOKENS", 1000)
    progress = SilentProgress()
    watch = LoadWatch(2, 0.5, progress)
    load = torch.tensor([[500.0, 500.0, 500.0, 500.0], [1000.0, 996.0, 2.0, 2.0]])
    watch.add(load / 2, 500)
    assert progress.notes == []
    watch.add(load / 2, 500)
    watch.add(load, 1000)
    assert len(progress.notes) == 2
    assert progress.notes[0].startswith("layer 1: expert 2 was chosen by 0.20% of the last 1,000 tokens")
    assert "an even share is 50%" in progress.notes[0]
    assert progress.notes[0].endswith("raise the balance loss: --loss balance=2")
    assert dead_experts([[0.5, 0.5, 0.5, 0.5]], 2) == []


def test_an_expert_that_factorize_left_idle_is_no_fault_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_watch, "WINDOW_TOKENS", 1000)
    progress = SilentProgress()
    watch = LoadWatch(2, 0.5, progress, idle=frozenset({(0, 2)}))
    watch.add(torch.tensor([[1000.0, 996.0, 2.0, 2.0]]), 1000)
    assert len(progress.notes) == 1
    assert progress.notes[0].startswith("layer 0: expert 3 was chosen")


def test_metrics_forget_later_steps_and_a_line_cut_short(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path)
    for step in (1, 2, 3):
        metrics.append({"step": step, "kd": float("nan")})
    with metrics.path.open("a") as file:
        file.write('{"step": 4, "k')
    metrics.keep_until(2)
    assert list(metrics.lines()) == [{"step": 1, "kd": None}, {"step": 2, "kd": None}]


@pytest.mark.parametrize("load", [[[0.5, 0.5], [0.9, 0.1]], []], ids=["routed", "K = 0"])
def test_the_picture_is_drawn(tmp_path: Path, load: list[list[float]]) -> None:
    lines = [{"tokens": 10, "kd": 1.0, "par": 2.0}, {"tokens": 20, "kd": 0.5, "par": None}]
    picture = draw_training(tmp_path, lines, load, "title")
    assert picture.read_bytes().startswith(b"\x89PNG")
