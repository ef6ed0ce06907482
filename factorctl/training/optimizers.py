"""Who learns, and how: parameter groups, optimisers and the learning rate as a function of the tokens seen."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from factorctl.config.finetune import TrainedPart
from factorctl.errors import UsageError
from factorctl.ffn.layer import FactoredFFN
from factorctl.training.muon import Muon, blocks_of
from factorctl.training.presets import LossWeights, TrainingRecipe

MIN_8BIT_SIZE = 4096
"""Smaller tensors keep a float32 state in `adamw-8bit`; routers always do."""


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then a cosine, both counted in tokens."""

    tokens: int
    warmup_tokens: float
    final_fraction: float

    def factor(self, seen: int) -> float:
        """What the learning rates are multiplied by in the step that ends after `seen` tokens."""
        if seen < self.warmup_tokens:
            return seen / self.warmup_tokens
        done = min(1.0, (seen - self.warmup_tokens) / max(1.0, self.tokens - self.warmup_tokens))
        return self.final_fraction + (1 - self.final_fraction) * 0.5 * (1 + math.cos(math.pi * done))


def choose_trained(ffns: Iterable[FactoredFFN], train: TrainedPart, weights: LossWeights) -> None:
    """Set `requires_grad` on exactly the parameters that were asked for and that some loss reaches.

    A router is reached where 0 < K < N, by its own losses or through a softmax gate (one chosen expert has gate 1
    whatever the logits). Experts are reached by what is measured on outputs; the routed ones not at K = 0.

    Raises:
        UsageError: nothing would learn.
    """
    by_output = weights.on_outputs
    trained = 0
    for ffn in ffns:
        routes = ffn.routes
        gate_learns = by_output and has_learning_gate(ffn)
        for name, parameter in ffn.named_parameters():
            if name == "router":
                wanted = train != "experts" and routes and (weights.on_routers or gate_learns)
            else:
                idle = ffn.top_k == 0 and name in ("gate_up", "gate_up_bias")
                wanted = train != "router" and by_output and not idle
            parameter.requires_grad_(wanted)
            trained += wanted
    if not trained:
        raise UsageError(
            f"--train {train} leaves nothing that these losses, gate and top-k would teach",
            "a router learns where 0 < K < N, through a softmax gate or from par; experts learn from lm, kd or mse",
        )


def has_learning_gate(ffn: FactoredFFN) -> bool:
    """Whether the layer's output depends on more of its router's logits than their order."""
    return ffn.gate == "softmax" and 1 < ffn.top_k < ffn.shape.num_experts


def is_router(name: str) -> bool:
    """Whether this is one of the parameters that routing consists of."""
    return name.endswith((".router", ".sharpness"))


def make_optimizers(model: nn.Module, recipe: TrainingRecipe) -> list[torch.optim.Optimizer]:
    """One optimiser for the experts, or two with `muon`, and one for the routers, of those that are trained.

    Two, because 8-bit AdamW may not take the routers: they are small and decide much, so their state stays float32.
    Routers have no weight decay: it would pull their logits to a draw. `muon` takes matrices; AdamW takes the rest.

    Raises:
        UsageError: 8-bit AdamW is not to be had here.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    experts = [p for name, p in trained if not is_router(name)]
    routers = [p for name, p in trained if name.endswith(".router")]
    sharpnesses = [p for name, p in trained if name.endswith(".sharpness")]
    made: list[torch.optim.Optimizer] = []
    if recipe.optimizer == "muon":
        cuts = {p: cut for m in model.modules() if isinstance(m, FactoredFFN) for p, cut in blocks_of(m).items()}
        matrices = {p: cuts[p] for p in experts if p in cuts}
        if matrices:
            made.append(Muon(matrices, lr=recipe.lr, weight_decay=recipe.weight_decay))
        experts = [p for p in experts if p not in matrices]
    if experts:
        made.append(_optimizer(experts, recipe, recipe.lr, recipe.weight_decay, eight_bit=True))
    if routers:
        decay = recipe.weight_decay if recipe.optimizer == "adam" else 0.0  # the paper's Adam decays all
        groups: list[dict[str, Any]] = [{"params": routers, "lr": recipe.router_lr}]
        if sharpnesses:
            groups.append({"params": sharpnesses, "lr": recipe.sharpness_lr, "weight_decay": 0.0})
        made.append(_optimizer(groups, recipe, recipe.router_lr, decay, eight_bit=False))
    for optimizer in made:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return made


def _optimizer(
    parameters: list[Any], recipe: TrainingRecipe, lr: float, weight_decay: float, *, eight_bit: bool
) -> torch.optim.Optimizer:
    if recipe.optimizer == "adamw-8bit" and eight_bit:
        made = _adamw_8bit()(
            parameters, lr=lr, betas=recipe.betas, weight_decay=weight_decay, min_8bit_size=MIN_8BIT_SIZE
        )
        assert isinstance(made, torch.optim.Optimizer)
        return made
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, lr=lr, betas=recipe.betas, weight_decay=weight_decay)


def _adamw_8bit() -> type:
    try:
        from bitsandbytes import optim
    except (ImportError, RuntimeError) as error:
        raise UsageError(
            f"--optimizer adamw-8bit needs bitsandbytes, which does not load here: {error}", "use --optimizer adamw"
        ) from None
    found: type = optim.AdamW8bit  # type: ignore[attr-defined]  # exported by import
    return found


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
