"""The options of `factorctl finetune`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from factorctl.config.common import CHECKPOINT, OVERWRITE, TEXT_FIELD, TOP_K, CommonConfig
from factorctl.config.kinds import NUMBER, TOKENS, TOKENS_OR_0, Pairs
from factorctl.config.option import Option
from factorctl.config.shape import Gate, ScaleRule

PresetName = Literal["default", "factorllm"]
TrainedPart = Literal["router", "experts", "all"]
OptimizerName = Literal["adamw", "adam", "adamw-8bit", "muon"]
Selection = Literal["unit", "stored"]
RefreshTarget = Literal["labels", "benefits"]
LabelSource = Literal["student", "teacher"]
TeacherStorage = Literal["none", "bf16", "8bit", "4bit"]
Routing = Literal["token", "domain"]
Precision = Literal["auto", "float32", "bfloat16"]
Tracker = Literal["tensorboard", "wandb", "trackio"]


@dataclass(frozen=True)
class FinetuneConfig(CommonConfig):
    """`factorctl finetune`. What is None takes the preset's or the checkpoint's value."""

    checkpoint: Annotated[Path | None, CHECKPOINT] = None
    tokens: Annotated[int, Option("Tokens to train on: 60K, 40M, 1.5B.", kind=TOKENS)] = 40_000_000
    top_k: Annotated[int | None, TOP_K] = None
    data: Annotated[
        str | None,
        Option("Files, folder, Hub dataset, or self; A=0.7,B=0.3. [default: web text from the Hub, fineweb-edu]"),
    ] = None
    text_field: Annotated[str | None, TEXT_FIELD] = None
    preset: Annotated[PresetName, Option("default: our best; factorllm: the paper's recipe.")] = "default"
    loss_weights: Annotated[
        Mapping[str, float],
        Option(
            "NAME=WEIGHT of lm, par, kd, mse, balance or z; may be repeated.",
            flag="--loss",
            kind=Pairs(NUMBER, "NAME=WEIGHT", "kd=0.5"),
        ),
    ] = field(default_factory=dict)
    """Overrides of the preset."""
    temperature: Annotated[float | None, Option("Of the logit distillation. [default: the preset's]")] = None
    gate: Annotated[Gate | None, Option("softmax or hard. [default: the preset's]")] = None
    scale: Annotated[ScaleRule | None, Option("sum, paper or fitted. [default: the preset's]")] = None
    routing: Annotated[
        Routing | None, Option("token, or domain: experts chosen once per domain. [default: the checkpoint's]")
    ] = None
    """`domain` is KnowledgeFactor: a text's experts are its domain's."""
    train: Annotated[TrainedPart, Option("What learns.")] = "all"
    router_warmup: Annotated[int, Option("Tokens at the start during which only routers learn.", kind=TOKENS_OR_0)] = 0
    labels_from: Annotated[
        LabelSource | None, Option("Whose neurons PAR's labels compare. [default: the preset's]")
    ] = None
    """Behind the student's down-projection."""
    router_refresh: Annotated[
        int, Option("Tokens between closed-form fits of the routers; 0 fits none.", kind=TOKENS_OR_0)
    ] = 0
    refresh_target: Annotated[RefreshTarget, Option("What these fits predict: PAR's labels, or benefits.")] = "labels"
    """Which experts PAR's labels name, or how much each would take off the error."""
    straight_through: Annotated[bool, Option("Let the outputs of all experts inform the routers.")] = False
    """Also of those that did not run."""
    heal_tokens: Annotated[
        int, Option("Tokens at the start during which each layer learns alone.", kind=TOKENS_OR_0)
    ] = 0
    """Its dense FFN's output on its own input."""
    optimizer: Annotated[OptimizerName | None, Option("What steps the weights. [default: the preset's]")] = None
    lr: Annotated[float | None, Option("Learning rate of the experts. [default: the preset's]")] = None
    router_lr: Annotated[
        float | None,
        Option("Learning rate of the routers, by logit; of stored ones, by weight. [default: the preset's]"),
    ] = None
    selection: Annotated[
        Selection | None, Option("Scale at which routers learn: unit, or as stored. [default: the preset's]")
    ] = None
    """`unit`: logits that differ by 1."""
    router_temperature: Annotated[
        float | None, Option("Of the logits in the routers' own losses. [default: the preset's]")
    ] = None
    sharpness_lr: Annotated[
        float | None,
        Option("Learning rate of how unequal each layer's gates are; 0 keeps that. [default: the preset's]"),
    ] = None
    """Of the number by which each layer's gates are sharper than the choice."""
    weight_decay: Annotated[float | None, Option("AdamW's, of the matrices. [default: the preset's]")] = None
    clip_norm: Annotated[float | None, Option("Largest norm of the gradient; 0 leaves it. [default: the preset's]")] = (
        None
    )
    batch_tokens: Annotated[
        int | None, Option("Tokens of one step, over all processes. [default: the preset's]", kind=TOKENS)
    ] = None
    block_length: Annotated[int, Option("Tokens of a training sequence.", kind=TOKENS_OR_0)] = 1024
    micro_batch: Annotated[
        int | None,
        Option(
            "Sequences that a process takes through the model at once. [default: 4096 tokens of them, 16,384 on a GPU]",
            role="how",
        ),
    ] = None
    heldout_tokens: Annotated[int, Option("Text kept from training, to measure on.", kind=TOKENS)] = 16_384
    max_epochs: Annotated[float, Option("How often the text may be seen before the run is refused.", role="how")] = 4.0
    precision: Annotated[Precision, Option("Of the computation. auto: bfloat16 on GPUs, float32 on CPUs.")] = "auto"
    gradient_checkpointing: Annotated[
        bool, Option("Compute layers twice instead of keeping activations.", role="how")
    ] = False
    compile: Annotated[bool, Option("torch.compile the decoder layers.", role="how")] = False
    teacher: Annotated[str | None, Option("The dense source, if it is not where the manifest says.")] = None
    """Needed where the checkpoint's own values are no longer the dense ones."""
    teacher_quant: Annotated[TeacherStorage, Option("How the teacher's FFNs are held; 8bit and 4bit on CUDA.")] = "none"
    save_every: Annotated[
        int | None, Option("Tokens between saved states. [default: a tenth of all]", kind=TOKENS, role="how")
    ] = None
    resume: Annotated[bool, Option("Go on from the last saved state of the same run.", role="place")] = False
    track: Annotated[
        tuple[Tracker, ...],
        Option("Also log to tensorboard, wandb or trackio; may be repeated.", role="how"),
    ] = ()
    overwrite: Annotated[bool, OVERWRITE] = False
