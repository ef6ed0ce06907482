"""The options of `factorctl finetune`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from factorctl.config.common import CommonConfig
from factorctl.config.shape import Gate, ScaleRule

PresetName = Literal["default", "factorllm"]
TrainedPart = Literal["router", "experts", "all"]
OptimizerName = Literal["adamw", "adam", "adamw-8bit", "muon"]
Selection = Literal["unit", "stored"]
RefreshTarget = Literal["labels", "benefits"]
LabelSource = Literal["student", "teacher"]
TeacherStorage = Literal["none", "bf16", "8bit", "4bit"]
Precision = Literal["auto", "float32", "bfloat16"]
Tracker = Literal["tensorboard", "wandb", "trackio"]


@dataclass(frozen=True)
class FinetuneConfig(CommonConfig):
    """`factorctl finetune`. What is None takes the preset's or the checkpoint's value."""

    tokens: int
    """Tokens to train on."""
    checkpoint: Path | None = None
    """A native checkpoint; None means the newest in the workspace."""
    top_k: int | None = None
    data: str | None = None
    """None means the default pretraining sample of the Hub."""
    text_field: str | None = None
    preset: PresetName = "default"
    loss_weights: Mapping[str, float] = field(default_factory=dict)
    """Overrides of the preset, by loss: lm, par, kd, mse, balance, z."""
    temperature: float | None = None
    gate: Gate | None = None
    scale: ScaleRule | None = None
    train: TrainedPart = "all"
    router_warmup: int = 0
    """Tokens at the start during which only the routers learn."""
    labels_from: LabelSource | None = None
    """Whose neurons PAR's labels compare, behind the student's down-projection."""
    router_refresh: int = 0
    """Tokens between two closed-form fits of the routers; 0 means none."""
    refresh_target: RefreshTarget = "labels"
    """What these fits predict: which experts PAR's labels name, or how much each would take off the error."""
    straight_through: bool = False
    """Let the outputs of all experts inform the choice, also of those that did not run."""
    heal_tokens: int = 0
    """Tokens at the start during which each layer learns its dense FFN's output on its own input."""
    optimizer: OptimizerName | None = None
    lr: float | None = None
    router_lr: float | None = None
    selection: Selection | None = None
    """At which scale routers are trained: `unit`, logits that differ by 1, or as `stored`."""
    router_temperature: float | None = None
    """Of the logits in the routers' own losses."""
    sharpness_lr: float | None = None
    """Of the number by which each layer's gates are sharper than the choice; 0 keeps it."""
    weight_decay: float | None = None
    clip_norm: float | None = None
    batch_tokens: int | None = None
    """Tokens per optimiser step, over all processes."""
    block_length: int = 1024
    """Tokens of a training sequence."""
    micro_batch: int | None = None
    """Sequences that one process takes through the model at once."""
    heldout_tokens: int = 16_384
    max_epochs: float = 4.0
    precision: Precision = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False
    teacher: str | None = None
    """The dense source, where the checkpoint's own values are no longer the dense ones."""
    teacher_quant: TeacherStorage = "none"
    save_every: int | None = None
    """Tokens between two saved states; None means a tenth of all."""
    resume: bool = False
    track: tuple[Tracker, ...] = ()
    overwrite: bool = False
