"""`finetune`: a factorized checkpoint in, one that is good at K of N out."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from factorctl.config.finetune import FinetuneConfig
from factorctl.data.blocks import TokenBlocks
from factorctl.errors import UsageError
from factorctl.files.publishing import make_directory, sole_writer, write_file
from factorctl.files.strict_json import dump_json, read_json_object
from factorctl.memory import peak_memory
from factorctl.pipeline.common.layer_records import recorded_load
from factorctl.pipeline.finetune.domains import route_by_domain, with_domains
from factorctl.pipeline.finetune.model import build_distiller, make_accelerator, start_trackers, training_blocks
from factorctl.pipeline.finetune.output import finetuned_manifest, publish_checkpoint, trained_tensors
from factorctl.pipeline.finetune.plan import RUN_NAME, FinetunePlan, plan_finetune, resolved_config
from factorctl.progress import Progress, SilentProgress
from factorctl.training.accelerate_settings import unused_settings
from factorctl.training.batches import Batches
from factorctl.training.distiller import Distiller
from factorctl.training.heldout import Heldout, measure
from factorctl.training.load_watch import dead_experts
from factorctl.training.loop import LoopOptions, TrainingLoop
from factorctl.training.metrics import MetricsFile, draw_training
from factorctl.training.optimizers import Schedule, make_optimizers
from factorctl.training.out_of_memory import memory_explained
from factorctl.training.selection import to_unit_spread
from factorctl.training.state import Progressed, incomplete_states, newest_state, remove_states, restore_state

REHEARSED_STEPS = 3
REHEARSAL_SECONDS = 20.0
"""Where steps are that slow, no further one is timed: warming up is little beside them. Several processes keep step."""


@dataclass(frozen=True)
class FinetuneResult:
    """What was reached; the keys of `--format json`."""

    checkpoint: str
    parent: str
    """sha256 of the parent's manifest."""
    notation: str
    preset: str
    tokens: int
    steps: int
    epochs: float
    losses_before: dict[str, float]
    losses: dict[str, float]
    """On the held-out text, before and after training, each before its weight."""
    par_of_chance: float | None
    """log N: PAR's loss where a router tells no expert from another."""
    perplexity_dense: float
    perplexity_before: float
    perplexity_after: float
    router_agreement_before: float | None
    router_agreement: float | None
    """Share of the teacher's labels that the routers choose, on the held-out text; K/N is chance."""
    dead_experts: list[tuple[int, int]]
    """(layer, expert) of experts that less than a hundredth of an even share of the held-out tokens chose."""
    tokens_per_second: float
    """Of all processes together, while training; 0 where a resumed run had nothing left to train."""
    seconds: float
    peak_memory_bytes: int
    metrics: str
    plot: str


@dataclass(frozen=True)
class Rehearsal:
    """What `--dry-run` found; nothing was written."""

    checkpoint: str
    notation: str
    preset: str
    tokens: int
    steps: int
    batch_tokens: int
    trained_parameters: int
    expected_memory: dict[str, int]
    expected_memory_bytes: int
    peak_memory_bytes: int
    """Of this process after the measured steps."""
    tokens_per_second: float
    seconds: float
    """Estimate for the whole run, held-out measurements included."""
    out: str


def finetune(config: FinetuneConfig, progress: Progress) -> FinetuneResult:
    """Train routers and experts against the dense teacher and publish the result.

    1. Check every option; state the memory.
    2. Tokenise the text, or find it in the cache.
    3. Put student and teacher into one model; measure both on held-out text.
    4. Train, saving states on the way; on `resume`, go on from the last one.
    5. Measure again, write the checkpoint, draw the picture, drop the states.

    Raises:
        FactorctlError: with what is wrong. Saved states are kept.
    """
    started = time.monotonic()
    plan = plan_finetune(config, progress)
    shown = progress if is_reporting_process() else SilentProgress()
    _say_beforehand(plan, shown)
    blocks = training_blocks(plan, shown)
    with _sole_run(plan):
        accelerator = make_accelerator(plan)
        if accelerator.is_main_process:
            open_run(plan, identity(plan, blocks), shown)
        accelerator.wait_for_everyone()
        start_trackers(plan, accelerator)
        batches = Batches(blocks, plan.batch, config.seed, accelerator.process_index, accelerator.device)
        with memory_explained("before training", plan.batch, plan.device, lambda: "no step was taken"):
            model, optimizers = _prepared(plan, blocks, accelerator, shown)
            start = _start(plan, model, optimizers, batches, accelerator, shown)
        before = Heldout(**start.notes["before"])
        plan = with_domains(plan, accelerator.unwrap_model(model))
        loop = TrainingLoop(accelerator, model, optimizers, batches, _loop_options(plan), plan.run, shown)
        training_started = time.monotonic()
        loop.train(start)
        training_seconds = time.monotonic() - training_started
        after = measure(model, batches, accelerator, shown, "Measuring after")
        tensors = trained_tensors(accelerator.unwrap_model(model), keeps=accelerator.is_main_process)
        manifest = finetuned_manifest(plan, blocks, before, after)
        title = f"{plan.checkpoint.manifest.source['id']} as {plan.spec.shape.notation}, preset {config.preset}"
        if accelerator.is_main_process:
            publish_checkpoint(plan, tensors, manifest, shown)
            draw_training(plan.run, list(MetricsFile(plan.run).lines()), after.load, title)
            remove_states(plan.run)
        accelerator.wait_for_everyone()
        accelerator.end_training()
    trained = plan.batch.tokens - start.tokens
    return FinetuneResult(
        checkpoint=str(plan.out),
        parent=plan.checkpoint.manifest.sha256,
        notation=plan.spec.shape.notation,
        preset=config.preset,
        tokens=plan.batch.tokens,
        steps=plan.batch.steps,
        epochs=batches.epochs(),
        losses_before=before.losses,
        losses=after.losses,
        par_of_chance=math.log(plan.spec.shape.num_experts) if "par" in after.losses else None,
        perplexity_dense=before.perplexity_dense,
        perplexity_before=before.perplexity,
        perplexity_after=after.perplexity,
        router_agreement_before=before.agreement,
        router_agreement=after.agreement,
        dead_experts=dead_experts(after.load, plan.spec.shape.top_k),
        tokens_per_second=round(trained / training_seconds, 1),
        seconds=round(time.monotonic() - started, 1),
        peak_memory_bytes=peak_memory(plan.device),
        metrics=str(MetricsFile(plan.run).path),
        plot=str(plan.run / "training.png"),
    )


def rehearse(config: FinetuneConfig, progress: Progress) -> Rehearsal:
    """Check everything and time a few steps on random tokens; the text is not read and nothing is written."""
    plan = plan_finetune(config, progress)
    _say_beforehand(plan, progress)
    if plan.sharded:
        make_accelerator(plan)  # joins the processes
    with memory_explained("in the rehearsal", plan.batch, plan.device, lambda: "no step was taken", rehearsed=True):
        return _rehearsed(plan, progress)


def _rehearsed(plan: FinetunePlan, progress: Progress) -> Rehearsal:
    config = plan.config
    distiller = build_distiller(plan, progress)
    optimizers = make_optimizers(distiller, plan.recipe)
    rows, length = plan.batch.micro_batch, plan.batch.block_length
    generator = torch.Generator().manual_seed(config.seed)
    seconds = []
    with progress.stage("Timing steps", total=REHEARSED_STEPS, unit="step") as task:
        for _ in range(REHEARSED_STEPS):
            vocabulary = int(plan.checkpoint.dense.config.vocab_size)
            ids_BL = torch.randint(vocabulary, (rows, length), generator=generator).to(plan.device)
            positions_BL = torch.arange(length, device=plan.device).repeat(rows, 1)
            seconds.append(_timed_step(distiller, optimizers, ids_BL, positions_BL))
            task.advance()
            if sum(seconds) > REHEARSAL_SECONDS and plan.batch.world_size == 1:
                break
    speed = rows * length * plan.batch.world_size / min(seconds[1:] or seconds)
    heldout_passes = 2 * config.heldout_tokens / 2  # two measurements, each about half the work of a step
    return Rehearsal(
        checkpoint=str(plan.checkpoint.path),
        notation=plan.spec.shape.notation,
        preset=config.preset,
        tokens=plan.batch.tokens,
        steps=plan.batch.steps,
        batch_tokens=plan.batch.batch_tokens,
        trained_parameters=plan.trained_parameters,
        expected_memory=plan.memory,
        expected_memory_bytes=plan.memory_bytes,
        peak_memory_bytes=peak_memory(plan.device),
        tokens_per_second=round(speed, 1),
        seconds=round((plan.batch.tokens + heldout_passes) / speed, 1),
        out=str(plan.out),
    )


def _timed_step(
    distiller: Distiller, optimizers: list[torch.optim.Optimizer], ids_BL: torch.Tensor, positions_BL: torch.Tensor
) -> float:
    """Seconds of one step with learning rate 0: real work, unchanged weights."""
    started = time.perf_counter()
    distiller(ids_BL, positions_BL).total.backward()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step()
        optimizer.zero_grad()
    if ids_BL.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _say_beforehand(plan: FinetunePlan, progress: Progress) -> None:
    for remark in (memory_statement(plan), *unused_settings()):
        progress.note(remark)


def memory_statement(plan: FinetunePlan) -> str:
    """The expected memory per process in one line, largest part first."""
    parts = sorted(plan.memory.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts if size >= 5e6)
    spread = f" in each of {plan.batch.world_size} processes that share the model" if plan.sharded else ""
    return f"expected memory {plan.memory_bytes / 1e9:.2f} GB on {plan.device.type}{spread}: {listed}"


def identity(plan: FinetunePlan, blocks: TokenBlocks) -> dict[str, Any]:
    """What a resumed run must have in common with the one it goes on from."""
    return {
        "base checkpoint": plan.checkpoint.manifest.sha256,
        "text": blocks.fingerprint,
        "world size": plan.batch.world_size,
        **resolved_config(plan),
    }


def open_run(plan: FinetunePlan, wanted: dict[str, Any], progress: Progress) -> None:
    """Make the run's directory, or hold a resumed run against what it was.

    Raises:
        UsageError: nothing to resume, another run than the one asked for, or an unfinished one in the way.
    """
    file = plan.run / RUN_NAME
    if plan.config.resume:
        if not file.is_file():
            raise UsageError(
                f"there is nothing to resume: {plan.run} holds no run", "leave --resume out, or name the run's --out"
            )
        changes = _differences(read_json_object(file), wanted)
        if changes:
            raise UsageError(
                f"{plan.run} was started differently:\n" + "\n".join(f"  {line}" for line in changes),
                "give the options it was started with, or leave --resume out and choose another --out",
            )
        return
    if newest_state(plan.run) is not None and not plan.config.overwrite:
        raise UsageError(f"an unfinished run lies in {plan.run}", "go on with --resume, or start over with --overwrite")
    make_directory(plan.run)
    remove_states(plan.run)
    MetricsFile(plan.run).keep_until(0)
    write_file(file, dump_json(wanted))


def _differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line per value that differs."""
    keys = sorted(then.keys() | now.keys())
    return [f"{key}: was {then.get(key)!r}, now {now.get(key)!r}" for key in keys if then.get(key) != now.get(key)]


def _start(
    plan: FinetunePlan,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    batches: Batches,
    accelerator: Any,
    progress: Progress,
) -> Progressed:
    """Where training begins: the last saved state, or the beginning with a first measurement."""
    state = newest_state(plan.run) if plan.config.resume else None
    start = None
    if state is not None:
        start = restore_state(state, accelerator.unwrap_model(model), optimizers)
        ignored = "".join(f"; ignored incomplete {name}" for name in incomplete_states(plan.run))
        progress.note(f"resuming from step {start.step} ({start.tokens:,} tokens){ignored}")
    elif plan.config.resume:
        progress.note("no state was saved yet: starting from the beginning")
    if accelerator.is_main_process:
        MetricsFile(plan.run).keep_until(start.step if start else 0)
    if start is None:
        if plan.recipe.selection == "unit":
            sample = batches.take("heldout", np.arange(1))
            to_unit_spread(accelerator.unwrap_model(model), *sample, accelerator)
        before = measure(model, batches, accelerator, progress, "Measuring before")
        start = Progressed(notes={"before": asdict(before)})
    return start


def _prepared(
    plan: FinetunePlan, blocks: TokenBlocks, accelerator: Any, progress: Progress
) -> tuple[nn.Module, list[Any]]:
    distiller = build_distiller(plan, progress)
    if plan.by_domain:
        route_by_domain(plan, distiller, blocks, progress)
    optimizers = make_optimizers(distiller, plan.recipe)
    if plan.sharded:
        return distiller, optimizers
    model, *optimizers = accelerator.prepare(distiller, *optimizers)
    return model, optimizers


def _loop_options(plan: FinetunePlan) -> LoopOptions:
    tokens = plan.batch.tokens
    recipe = plan.recipe
    return LoopOptions(
        schedule=Schedule(tokens, recipe.warmup_fraction * tokens, recipe.final_lr_fraction),
        clip_norm=recipe.clip_norm,
        router_warmup=plan.config.router_warmup,
        router_refresh=plan.config.router_refresh,
        heal_tokens=plan.config.heal_tokens,
        save_every=plan.save_every,
        top_k=plan.spec.shape.top_k,
        balance=recipe.weights.balance,
        idle=_idle_experts(plan),
    )


def _idle_experts(plan: FinetunePlan) -> frozenset[tuple[int, int]]:
    """What `factorize` found that hardly any token needs; another K, another choice."""
    parent = plan.checkpoint.manifest
    load_LN = recorded_load(parent.details.get("layers") or [])
    same_choice = parent.factored.get("top_k") == plan.spec.shape.top_k
    return frozenset(dead_experts(load_LN, plan.spec.shape.top_k)) if load_LN and same_choice else frozenset()


@contextmanager
def _sole_run(plan: FinetunePlan) -> Iterator[None]:
    """Hold the run's directory against other runs; only the first of several processes holds the lock."""
    if not is_reporting_process():
        yield
        return
    with sole_writer(plan.run):
        yield


def is_reporting_process() -> bool:
    """Whether this is the first of the processes that train together: the one that shows and writes things."""
    return int(os.environ.get("RANK", "0")) == 0
