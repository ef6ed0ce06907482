"""`factorctl finetune`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from factorctl.cli.options import (
    CheckpointArg,
    DeviceOpt,
    DryRunOpt,
    DTypeOpt,
    FormatOpt,
    OutOpt,
    OutputFormat,
    OverwriteOpt,
    QuietOpt,
    SeedOpt,
    TextFieldOpt,
    TopKOpt,
    WorkspaceOpt,
)
from factorctl.config.common import DEFAULT_WORKSPACE
from factorctl.config.finetune import (
    FinetuneConfig,
    LabelSource,
    OptimizerName,
    Precision,
    PresetName,
    RefreshTarget,
    Selection,
    TeacherStorage,
    Tracker,
    TrainedPart,
)
from factorctl.config.shape import Gate, ScaleRule
from factorctl.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from factorctl.pipeline.finetune.run import FinetuneResult, Rehearsal


def finetune(
    checkpoint: CheckpointArg = None,
    tokens: Annotated[str, typer.Option("--tokens", help="Tokens to train on: 60K, 40M, 1.5B.")] = "40M",
    top_k: TopKOpt = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="Files, folder, Hub dataset, or self; A=0.7,B=0.3. [default: a Hub sample]"),
    ] = None,
    text_field: TextFieldOpt = None,
    preset: Annotated[
        PresetName, typer.Option("--preset", help="default: our best; factorllm: the paper's recipe.")
    ] = "default",
    loss: Annotated[
        list[str] | None,
        typer.Option("--loss", help="NAME=WEIGHT of lm, par, kd, mse, balance or z; may be repeated."),
    ] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="Of the logit distillation.")] = None,
    gate: Annotated[Gate | None, typer.Option("--gate", help="softmax or hard. [default: the preset's]")] = None,
    scale: Annotated[
        ScaleRule | None, typer.Option("--scale", help="sum, paper or fitted. [default: the preset's]")
    ] = None,
    train: Annotated[TrainedPart, typer.Option("--train", help="What learns.")] = "all",
    router_warmup: Annotated[
        str | None, typer.Option("--router-warmup", help="Tokens at the start during which only routers learn.")
    ] = None,
    labels_from: Annotated[
        LabelSource | None,
        typer.Option("--labels-from", help="Whose neurons PAR's labels compare. [default: the preset's]"),
    ] = None,
    router_refresh: Annotated[
        str | None, typer.Option("--router-refresh", help="Tokens between closed-form fits of the routers.")
    ] = None,
    refresh_target: Annotated[
        RefreshTarget, typer.Option("--refresh-target", help="What these fits predict: PAR's labels, or benefits.")
    ] = "labels",
    straight_through: Annotated[
        bool, typer.Option("--straight-through", help="Let the outputs of all experts inform the routers.")
    ] = False,
    heal_tokens: Annotated[
        str | None, typer.Option("--heal-tokens", help="Tokens at the start during which each layer learns alone.")
    ] = None,
    optimizer: Annotated[OptimizerName | None, typer.Option("--optimizer", help="[default: the preset's]")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Of the experts.")] = None,
    router_lr: Annotated[
        float | None, typer.Option("--router-lr", help="Of the routers, by logit; of stored ones, by weight.")
    ] = None,
    selection: Annotated[
        Selection | None,
        typer.Option("--selection", help="Scale at which routers learn: unit, or as stored. [default: the preset's]"),
    ] = None,
    router_temperature: Annotated[
        float | None, typer.Option("--router-temperature", help="Of the logits in the routers' own losses.")
    ] = None,
    sharpness_lr: Annotated[
        float | None, typer.Option("--sharpness-lr", help="Of how unequal each layer's gates are; 0 keeps that.")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option("--weight-decay", help="AdamW's, of the matrices.")] = None,
    clip_norm: Annotated[
        float | None, typer.Option("--clip-norm", help="Largest norm of the gradient; 0 leaves it.")
    ] = None,
    batch_tokens: Annotated[
        str | None, typer.Option("--batch-tokens", help="Tokens of one step, over all processes.")
    ] = None,
    block_length: Annotated[int, typer.Option("--block-length", help="Tokens of a training sequence.")] = 1024,
    micro_batch: Annotated[
        int | None, typer.Option("--micro-batch", help="Sequences that a process takes through the model at once.")
    ] = None,
    heldout_tokens: Annotated[
        str, typer.Option("--heldout-tokens", help="Text kept from training, to measure on.")
    ] = "16384",
    max_epochs: Annotated[
        float, typer.Option("--max-epochs", help="How often the text may be seen before the run is refused.")
    ] = 4.0,
    precision: Annotated[
        Precision, typer.Option("--precision", help="Of the computation. auto: bfloat16 on GPUs, float32 on CPUs.")
    ] = "auto",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute layers twice instead of keeping activations.")
    ] = False,
    compile_: Annotated[bool, typer.Option("--compile", help="torch.compile the decoder layers.")] = False,
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="The dense source, if it is not where the manifest says.")
    ] = None,
    teacher_quant: Annotated[
        TeacherStorage, typer.Option("--teacher-quant", help="How the teacher's FFNs are held; 8bit and 4bit on CUDA.")
    ] = "none",
    save_every: Annotated[
        str | None, typer.Option("--save-every", help="Tokens between saved states. [default: a tenth of all]")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last saved state of the same run.")] = False,
    track: Annotated[
        list[str] | None, typer.Option("--track", help="Also log to tensorboard, wandb or trackio; may be repeated.")
    ] = None,
    out: OutOpt = None,
    workspace: WorkspaceOpt = DEFAULT_WORKSPACE,
    seed: SeedOpt = 0,
    device: DeviceOpt = "auto",
    dtype: DTypeOpt = "auto",
    overwrite: OverwriteOpt = False,
    dry_run: DryRunOpt = False,
    output: FormatOpt = "text",
    quiet: QuietOpt = False,
) -> None:
    """Train routers and experts of a factorized checkpoint against its dense source.

    Attention, norms, embeddings and head stay frozen. States, metrics.jsonl and training.png go into OUT.training.
    With several processes: accelerate launch -m factorctl finetune ...

    Examples:

        factorctl finetune runs/demo-1R4E2K --tokens 60K --data notes.jsonl

        factorctl finetune --preset factorllm --top-k 2 --tokens 10M --data self
    """
    from factorctl.cli.render import progress_listener
    from factorctl.pipeline.finetune import run as pipeline
    from factorctl.quantities import parse_token_count as count

    config = FinetuneConfig(
        checkpoint=checkpoint,
        tokens=count(tokens),
        top_k=top_k,
        data=data,
        text_field=text_field,
        preset=preset,
        loss_weights=loss_weights(loss or []),
        temperature=temperature,
        gate=gate,
        scale=scale,
        train=train,
        router_warmup=count(router_warmup, "--router-warmup") if router_warmup else 0,
        labels_from=labels_from,
        router_refresh=count(router_refresh, "--router-refresh") if router_refresh else 0,
        refresh_target=refresh_target,
        straight_through=straight_through,
        heal_tokens=count(heal_tokens, "--heal-tokens") if heal_tokens else 0,
        optimizer=optimizer,
        lr=lr,
        router_lr=router_lr,
        selection=selection,
        router_temperature=router_temperature,
        sharpness_lr=sharpness_lr,
        weight_decay=weight_decay,
        clip_norm=clip_norm,
        batch_tokens=count(batch_tokens, "--batch-tokens") if batch_tokens else None,
        block_length=block_length,
        micro_batch=micro_batch,
        heldout_tokens=count(heldout_tokens, "--heldout-tokens"),
        max_epochs=max_epochs,
        precision=precision,
        gradient_checkpointing=gradient_checkpointing,
        compile=compile_,
        teacher=teacher,
        teacher_quant=teacher_quant,
        save_every=count(save_every, "--save-every") if save_every else None,
        resume=resume,
        track=trackers(track or []),
        out=out,
        workspace=workspace,
        seed=seed,
        device=device,
        dtype=dtype,
        overwrite=overwrite,
    )
    progress = progress_listener(quiet=quiet or not pipeline.is_reporting_process())
    if dry_run:
        found = pipeline.rehearse(config, progress)
        if pipeline.is_reporting_process():
            _show_rehearsal(found, output)
        return
    result = pipeline.finetune(config, progress)
    if pipeline.is_reporting_process():
        _show_result(result, output)


def trackers(names: list[str]) -> tuple[Tracker, ...]:
    """`--track NAME`, repeated.

    Raises:
        UsageError: a name that is no tracker.
    """
    known = get_args(Tracker)
    for name in names:
        if name not in known:
            raise UsageError(f"--track {name} is not known", did_you_mean(name, known))
    return cast("tuple[Tracker, ...]", tuple(names))


def loss_weights(pairs: list[str]) -> dict[str, float]:
    """`--loss kd=0.5`, repeated, as a mapping.

    Raises:
        UsageError: a pair without '=', a weight that is no number, or a loss given twice.
    """
    weights: dict[str, float] = {}
    for pair in pairs:
        name, _, number = pair.partition("=")
        try:
            weight = float(number)
        except ValueError:
            raise UsageError(f"--loss {pair!r} is no NAME=WEIGHT", "for example --loss kd=0.5") from None
        if name in weights:
            raise UsageError(f"--loss {name} is given twice")
        weights[name] = weight
    return weights


def _show_rehearsal(found: Rehearsal, output: OutputFormat) -> None:
    from dataclasses import asdict

    from factorctl.cli.render import gigabytes, show_plan

    words = {
        "from": found.checkpoint,
        "notation": found.notation,
        "preset": found.preset,
        "tokens": f"{found.tokens:,} in {found.steps:,} steps of {found.batch_tokens:,}",
        "trained values": f"{found.trained_parameters:,}",
        "expected memory": f"{gigabytes(found.expected_memory_bytes)} per process",
        "peak of the measured steps": gigabytes(found.peak_memory_bytes),
        "speed": f"{found.tokens_per_second:,.0f} tokens/s",
        "time": f"about {_duration(found.seconds)}",
        "out": found.out,
    }
    show_plan(asdict(found), words, output=output)


def _show_result(result: FinetuneResult, output: OutputFormat) -> None:
    from factorctl.cli.render import facts_table, gigabytes, rows_table, show

    perplexities = rows_table(
        "Held-out perplexity",
        ["dense", "before", "after"],
        [[result.perplexity_dense, result.perplexity_before, result.perplexity_after]],
    )
    facts: dict[str, object] = {
        "notation": result.notation,
        "preset": result.preset,
        "tokens": f"{result.tokens:,} in {result.steps:,} steps, {result.epochs:.2f} epochs",
        "losses (held out)": "  ".join(f"{name} {value:.3f}" for name, value in result.losses.items()),
    }
    if result.router_agreement is not None and result.router_agreement_before is not None:
        before, after = result.router_agreement_before, result.router_agreement
        facts["router agreement"] = f"{before:.1%} before, {after:.1%} after"
        facts["PAR (held out)"] = (
            f"{result.par_of_chance:.3f} by chance, {result.losses_before['par']:.3f} before, "
            f"{result.losses['par']:.3f} after"
        )
        facts["dead experts"] = ", ".join(f"layer {la} expert {e}" for la, e in result.dead_experts) or "none"
    facts |= {
        "speed": f"{result.tokens_per_second:,.0f} tokens/s",
        "time": _duration(result.seconds),
        "peak memory": gigabytes(result.peak_memory_bytes),
        "metrics": result.metrics,
        "picture": result.plot,
        "written to": result.checkpoint,
    }
    tables = [perplexities, facts_table("Finetuned", facts)]
    show(result, output=output, tables=tables, closing=[f"Next: factorctl eval {result.checkpoint} --data TEXT"])


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {left} s"
