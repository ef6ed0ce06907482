"""Recipes: which losses with which weights, gate, scale, optimiser and schedule. The command line overrides each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from factorctl.config.finetune import FinetuneConfig, LabelSource, OptimizerName, PresetName, Selection
from factorctl.config.shape import Gate, ScaleRule
from factorctl.errors import UsageError, did_you_mean


@dataclass(frozen=True)
class LossWeights:
    """Weight of each loss in the sum; 0 leaves it out, and what only it needs is not computed."""

    lm: float = 0.0
    par: float = 0.0
    kd: float = 0.0
    mse: float = 0.0
    balance: float = 0.0
    z: float = 0.0

    @property
    def on_outputs(self) -> bool:
        """Whether any loss is measured on what the experts give."""
        return bool(self.lm or self.kd or self.mse)

    @property
    def on_routers(self) -> bool:
        """Whether any loss is measured on the routers' logits themselves."""
        return bool(self.par or self.balance or self.z)


@dataclass(frozen=True)
class TrainingRecipe:
    """Everything about the training that a preset decides."""

    weights: LossWeights
    optimizer: OptimizerName
    lr: float
    """Of the experts."""
    router_lr: float
    """With `selection` `unit` about how far a step moves a typical token's logit, else a weight."""
    betas: tuple[float, float]
    weight_decay: float
    warmup_fraction: float
    """Share of the tokens over which the learning rate rises from 0."""
    final_lr_fraction: float
    """What is left of the learning rate at the end of the cosine."""
    clip_norm: float
    """The gradient's norm over all trained values is cut to this, after the backward pass; 0 leaves it."""
    temperature: float = 1.0
    """Of the logit distillation."""
    selection: Selection = "stored"
    """`unit` trains routers whose logits have unit spread, and a sharpness apart from them; `stored` as they are."""
    router_temperature: float = 1.0
    """Of the routers' own losses."""
    sharpness_lr: float = 0.0
    """Of the sharpness of the gates; 0 keeps it."""
    gate: Gate | None = None
    """None keeps the checkpoint's."""
    scale: ScaleRule | None = None
    label_share: str = "paper"
    """Part of the target that one expert is compared with: `paper` K/N; `scale` 1/a, what its output counts for."""
    labels_from: LabelSource = "student"
    """`student` computes every expert anew for PAR's labels; `teacher` takes what the dense FFN's neurons give, which
    is at hand: the same until gate and up rows have moved."""
    batch_tokens: int | None = None
    """None: a 256th of all tokens, between 1024 and 32,768."""
    lr_by_active: bool = False
    """Whether `lr` is for half of the FFN's neurons, and in inverse proportion to the share that is active."""


PRESETS: Mapping[PresetName, TrainingRecipe] = {
    # FactorLLM as published: PAR beside the language-model loss (weight .05 in the released code), hard gate, N/K,
    # Adam with its schedule of 500 warm-up steps in 10,000 and batches of 1 x 1024 tokens. The released code clips
    # before the backward pass, that is not at all.
    "factorllm": TrainingRecipe(
        weights=LossWeights(lm=1.0, par=0.05),
        optimizer="adam",
        lr=4e-5,
        router_lr=4e-5,
        betas=(0.9, 0.95),
        weight_decay=1e-5,
        warmup_fraction=0.05,
        final_lr_fraction=0.0,
        clip_norm=0.0,
        gate="hard",
        scale="paper",
        batch_tokens=1024,
    ),
    # Chosen by trials on the demo model (docs/benchmarks, routing-demo and routing-options). PAR is a mean over layers:
    # without it, what distillation tells the gates leads the routers away from the teacher's choice, and perplexity
    # ends far higher. Routers that step ten times as fast (3) lower PAR's loss further, but a run of few steps unlearns
    # the choice that calibration fitted, and ends above where it began.
    "default": TrainingRecipe(
        weights=LossWeights(lm=0.5, par=5.0, kd=1.0, mse=0.0, balance=0.5, z=0.0),
        optimizer="adamw",
        lr=5e-4,
        router_lr=0.3,
        betas=(0.9, 0.95),
        weight_decay=0.01,
        warmup_fraction=0.05,
        final_lr_fraction=0.1,
        clip_norm=1.0,
        selection="unit",
        router_temperature=4.0,
        sharpness_lr=1e-2,
        gate="softmax",
        label_share="scale",
        labels_from="teacher",
        lr_by_active=True,
    ),
}


def recipe_of(config: FinetuneConfig, active_ffn_fraction: float) -> TrainingRecipe:
    """The preset with what `config` overrides, for a model with such a share of its FFN neurons active.

    Raises:
        UsageError: an unknown loss, a negative weight, or no weight at all.
    """
    preset = PRESETS[config.preset]
    weights = _weights(preset.weights, config.loss_weights)
    names = (
        "optimizer",
        "lr",
        "router_lr",
        "selection",
        "router_temperature",
        "sharpness_lr",
        "weight_decay",
        "clip_norm",
        "temperature",
        "gate",
        "scale",
        "batch_tokens",
        "labels_from",
    )
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    by_active = preset.lr * 0.5 / active_ffn_fraction if preset.lr_by_active else preset.lr
    recipe = replace(preset, weights=weights, **{"lr": by_active, **given})
    _check_numbers(recipe)
    return recipe


def batch_tokens_of(recipe: TrainingRecipe, tokens: int, block_length: int) -> int:
    """Tokens of one optimiser step: as given, or in proportion to the budget and at least a sequence."""
    return recipe.batch_tokens or max(block_length, min(32_768, max(1024, tokens // 256)))


def _weights(preset: LossWeights, given: Mapping[str, float]) -> LossWeights:
    known = {field.name for field in fields(LossWeights)}
    for name, weight in given.items():
        if name not in known:
            raise UsageError(f"--loss names '{name}', which is no loss", did_you_mean(name, known))
        if not 0 <= weight < float("inf"):
            raise UsageError(f"--loss {name}={weight:g} is no weight", "choose 0 or more")
    weights = replace(preset, **given)
    if not any((weights.lm, weights.par, weights.kd, weights.mse)):
        raise UsageError("every loss that teaches has weight 0", "give lm, kd, mse or par a weight: --loss kd=1")
    return weights


def _check_numbers(recipe: TrainingRecipe) -> None:
    limits: dict[str, Any] = {
        "--lr": recipe.lr,
        "--router-lr": recipe.router_lr,
        "--router-temperature": recipe.router_temperature,
        "--temperature": recipe.temperature,
    }
    for option, value in limits.items():
        if not 0 < value < float("inf"):
            raise UsageError(f"{option} {value:g} is out of range", "choose a number above 0")
    limits = {
        "--sharpness-lr": recipe.sharpness_lr,
        "--weight-decay": recipe.weight_decay,
        "--clip-norm": recipe.clip_norm,
    }
    for option, value in limits.items():
        if not 0 <= value < float("inf"):
            raise UsageError(f"{option} {value:g} is out of range", "choose 0 or more")
