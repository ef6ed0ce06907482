"""What `finetune` decides before it loads a weight: shapes, recipe, batches, teacher, memory, and where things go."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from factorctl.checkpoint.manifest import is_artefact
from factorctl.checkpoint.sources import Source
from factorctl.config.finetune import FinetuneConfig
from factorctl.config.option import recorded
from factorctl.data.spec import DEFAULT_PRETRAINING_DATA, DataSpec, parse_data_spec
from factorctl.errors import UsageError
from factorctl.ffn.spec import FactoredSpec
from factorctl.files.publishing import refuse_existing
from factorctl.models.building import empty_factored_model, factored_ffns
from factorctl.models.loading import NativeCheckpoint, open_checkpoint
from factorctl.pipeline.common.dense_source import find_source
from factorctl.pipeline.common.devices import torch_device
from factorctl.pipeline.common.recorded_source import find_recorded_source, has_recorded_weights, holds_dense_values
from factorctl.pipeline.common.workspace import newest_checkpoint, output_path
from factorctl.pipeline.finetune.memory import expected_memory, require_resources
from factorctl.progress import Progress
from factorctl.training.accelerate_settings import refuse_other_trainers
from factorctl.training.batches import BatchPlan, plan_batches
from factorctl.training.optimizers import choose_trained
from factorctl.training.presets import PRESETS, TrainingRecipe, batch_tokens_of, recipe_of
from factorctl.training.sharding import sharding_asked_for
from factorctl.training.teacher import require_cuda_for

RUN_NAME = "run.json"
"""Says, in the training directory, what the run is."""


@dataclass(frozen=True)
class FinetunePlan:
    """Everything that is decided before the first weight is read."""

    config: FinetuneConfig
    checkpoint: NativeCheckpoint
    spec: FactoredSpec
    """K, gate and scale of the result."""
    by_domain: bool
    """Whether experts are chosen by domain: as the checkpoint says, or else as its first text tells."""
    recipe: TrainingRecipe
    data: DataSpec
    batch: BatchPlan
    sharded: bool
    """Whether the processes share one model (FSDP2) instead of holding one each."""
    device: torch.device
    compute_dtype: torch.dtype
    teacher: Source | None
    """The dense source; None where the checkpoint's own values still are the dense ones."""
    out: Path
    run: Path
    """Directory of training states, metrics and the picture."""

    @cached_property
    def outline(self) -> PreTrainedModel:
        """The student on the meta device, where only shapes are and what is trained."""
        model = empty_factored_model(self.checkpoint.dense, self.spec).requires_grad_(False)
        choose_trained(factored_ffns(model), self.config.train, self.recipe.weights)
        return model

    @cached_property
    def memory(self) -> dict[str, int]:
        """Expected bytes per process, by use."""
        return expected_memory(self, self.outline)

    @property
    def trained_parameters(self) -> int:
        return sum(p.numel() for p in self.outline.parameters() if p.requires_grad)

    @property
    def save_every(self) -> int:
        return self.config.save_every or max(self.batch.batch_tokens, self.batch.tokens // 10)

    @property
    def memory_bytes(self) -> int:
        return sum(self.memory.values())


def plan_finetune(config: FinetuneConfig, progress: Progress) -> FinetunePlan:
    """Resolve and check all that can be checked without reading weights.

    Raises:
        UsageError: an option does not fit the checkpoint or another option.
        ResourceError: disk, memory or device do not suffice.
    """
    device = _local_device(config)
    refuse_other_trainers(device.type)
    require_cuda_for(config.teacher_quant, device)
    checkpoint = open_checkpoint(config.checkpoint or newest_checkpoint(config.workspace))
    spec = target_spec(checkpoint.spec, config)
    recipe = recipe_of(config, spec.shape.active_ffn_fraction)
    by_domain = routes_by_domain(config, spec)
    if by_domain:
        config, recipe = without_routers(config, recipe, spec)
    sharded = sharding_asked_for() and world_size() > 1
    _check_processes(sharded, config, recipe, by_domain=by_domain)
    _check_lengths(config, checkpoint)
    data = parse_data_spec(config.data or DEFAULT_PRETRAINING_DATA, text_field=config.text_field)
    batch = plan_batches(
        config.tokens,
        batch_tokens=batch_tokens_of(recipe, config.tokens, config.block_length),
        block_length=config.block_length,
        micro_batch=config.micro_batch,
        world_size=world_size(),
        device_type=device.type,
    )
    out = output_path(config.out, config.workspace, checkpoint.path.name, f"{config.preset}-{spec.shape.notation}")
    _check_output(config, out)
    plan = FinetunePlan(
        config=config,
        checkpoint=checkpoint,
        spec=spec,
        by_domain=by_domain,
        recipe=recipe,
        data=data,
        batch=batch,
        sharded=sharded,
        device=device,
        compute_dtype=training_dtype(config, device),
        teacher=find_teacher(config, checkpoint, progress),
        out=out,
        run=training_directory(out),
    )
    require_resources(plan)
    return plan


def training_directory(out: Path) -> Path:
    """Where states, metrics and picture of the run that makes `out` lie."""
    return out.with_name(f"{out.name}.training")


def target_spec(base: FactoredSpec, config: FinetuneConfig) -> FactoredSpec:
    """The checkpoint's sizes with the K, gate and scale to train at.

    Raises:
        UsageError: K does not fit, or the scale was fitted for another K.
    """
    preset = PRESETS[config.preset]
    top_k = base.shape.top_k if config.top_k is None else config.top_k
    spec, gate = base.with_top_k(top_k, config.scale or preset.scale), config.gate or preset.gate
    return spec if gate is None else replace(spec, gate=gate)


def _check_lengths(config: FinetuneConfig, checkpoint: NativeCheckpoint) -> None:
    context = checkpoint.dense.context
    if config.block_length < 2 or (context is not None and config.block_length > context):
        limit = "2 tokens or more" if context is None else f"2 to {context} tokens, the model's context"
        raise UsageError(f"--block-length {config.block_length} is out of range", f"choose {limit}")
    if config.heldout_tokens < 1:
        raise UsageError("--heldout-tokens 0 leaves nothing to measure on", "a held-out split is always kept: try 16K")
    if config.save_every is not None and config.save_every < 1:
        raise UsageError(f"--save-every {config.save_every} is out of range", "choose a number of tokens")
    if not 0 <= config.router_warmup <= config.tokens:
        raise UsageError(
            f"--router-warmup {config.router_warmup} is not within the {config.tokens} tokens of the run",
            "choose fewer; --train router trains routers alone for all of it",
        )
    if not 0 <= config.heal_tokens <= config.tokens:
        raise UsageError(
            f"--heal-tokens {config.heal_tokens} is not within the {config.tokens} tokens of the run",
            "they are its beginning: choose fewer, or more --tokens",
        )
    if not 0 <= config.router_refresh <= config.tokens:
        raise UsageError(
            f"--router-refresh {config.router_refresh} is not within the {config.tokens} tokens of the run",
            "it is the distance between two fits: a quarter of the tokens, for example",
        )


def routes_by_domain(config: FinetuneConfig, spec: FactoredSpec) -> bool:
    """Whether experts are chosen by domain.

    Raises:
        UsageError: routers are asked for that the checkpoint does not have.
    """
    if config.routing == "token" and spec.domains is not None:
        raise UsageError(
            "--routing token does not fit: this checkpoint chooses experts by domain and has no routers",
            "leave --routing out, or train the checkpoint that it was made from",
        )
    return config.routing == "domain" or spec.domains is not None


def without_routers(
    config: FinetuneConfig, recipe: TrainingRecipe, spec: FactoredSpec
) -> tuple[FinetuneConfig, TrainingRecipe]:
    """The same run with nothing that is there for routers: they do not choose, so they do not learn.

    Raises:
        UsageError: there is no choice between experts, or an option is about routers.
    """
    if not 0 < spec.shape.top_k < spec.shape.num_experts:
        raise UsageError(
            f"--routing domain has nothing to choose at {spec.shape.notation}", "choose a --top-k between 0 and N"
        )
    about_routers = {
        "--train router": config.train == "router",
        "--router-warmup": config.router_warmup > 0,
        "--router-refresh": config.router_refresh > 0,
        "--straight-through": config.straight_through,
    }
    if asked := [option for option, given in about_routers.items() if given]:
        raise UsageError(f"{asked[0]} has no meaning with --routing domain: no router chooses", "leave it out")
    if config.compile:
        raise UsageError(
            "--compile does not work with --routing domain, whose choice is no part of a graph", "leave it out"
        )
    weights = replace(recipe.weights, par=0.0, balance=0.0, z=0.0)
    if not weights.on_outputs:
        raise UsageError("every loss that teaches experts has weight 0", "give lm, kd or mse a weight: --loss kd=1")
    return replace(config, train="experts"), replace(recipe, weights=weights)


def _check_processes(sharded: bool, config: FinetuneConfig, recipe: TrainingRecipe, *, by_domain: bool) -> None:
    if sharded and by_domain:
        raise UsageError(
            "--routing domain does not work on a sharded model: it looks at whole embeddings", "leave --use_fsdp out"
        )
    if world_size() > 1 and config.router_refresh:
        raise UsageError(
            "--router-refresh needs a process of its own: what layers collect for a fit is not added up over several",
            "leave it out, or start one process",
        )
    if sharded and recipe.optimizer == "muon":
        raise UsageError(
            "--optimizer muon does not work on a sharded model: it needs whole matrices",
            "use --optimizer adamw, whose state is spread over the processes, or leave --use_fsdp out",
        )
    if sharded and config.heal_tokens:
        raise UsageError(
            "--heal-tokens does not work on a sharded model: a layer that learns alone has no gradient to wait for",
            "leave --use_fsdp out, or heal in a run of its own and go on from its result",
        )
    if sharded and recipe.optimizer == "adamw-8bit":
        raise UsageError(
            "--optimizer adamw-8bit does not work on a sharded model: bitsandbytes steps whole tensors only",
            "use --optimizer adamw, whose state is spread over the processes, or leave --use_fsdp out",
        )


def _check_output(config: FinetuneConfig, out: Path) -> None:
    if config.resume and out.is_dir() and is_artefact(out) and not config.overwrite:
        raise UsageError(f"there is nothing to resume: {out} is finished", "choose another --out to train it further")
    refuse_existing(out, overwrite=config.overwrite)


def _local_device(config: FinetuneConfig) -> torch.device:
    """This process's device: with several GPUs, the one that the launcher gave it."""
    device = torch_device(config.device)
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if device.type == "cuda" else device


def world_size() -> int:
    """Processes that train together, as torchrun and accelerate launch announce it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def training_dtype(config: FinetuneConfig, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on GPUs that have it, float32 elsewhere."""
    if config.precision != "auto":
        return torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def find_teacher(config: FinetuneConfig, checkpoint: NativeCheckpoint, progress: Progress) -> Source | None:
    """The dense source as teacher, or None where the checkpoint itself with all experts on is the teacher.

    Raises:
        UsageError: the source is needed and is not to be found, or what was named is another model.
    """
    manifest = checkpoint.manifest
    if config.teacher is None and holds_dense_values(manifest):
        return None
    known = manifest.source
    if config.teacher is not None:
        source = find_source(config.teacher, progress)
    else:
        why = "since this checkpoint's values are no longer the dense ones"
        wanted_for = f"the teacher is the dense source {known['id']}, {why}"
        source = find_recorded_source(known, progress, wanted_for=wanted_for, hint="name it with --teacher MODEL")
    if not has_recorded_weights(source.path, known["files"]):
        raise UsageError(
            f"{source.path} is not the dense model that {checkpoint.path} was made from ({known['id']}): its weights "
            "have other hashes than the manifest records",
            "name that model with --teacher; student and teacher share its attention and embeddings",
        )
    return source


def resolved_config(plan: FinetunePlan) -> dict[str, Any]:
    """The configuration as JSON, presets resolved: what decides the result."""
    recipe = asdict(plan.recipe)
    weights = recipe.pop("weights")
    return {
        **recorded(plan.config),
        **recipe,
        "loss_weights": weights,
        "betas": list(plan.recipe.betas),
        "data": plan.config.data or DEFAULT_PRETRAINING_DATA,
        "top_k": plan.spec.shape.top_k,
        "gate": plan.spec.gate,
        "scale": plan.spec.scale,
        "precision": str(plan.compute_dtype).removeprefix("torch."),
        "device": plan.device.type,
        "batch_tokens": plan.batch.batch_tokens,
    }
