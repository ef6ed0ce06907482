"""`factorctl eval`."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from factorctl.cli.options import (
    DeviceOpt,
    DryRunOpt,
    DTypeOpt,
    FormatOpt,
    OutputFormat,
    QuietOpt,
    SeedOpt,
    TextFieldOpt,
    WorkspaceOpt,
)
from factorctl.config.common import DEFAULT_WORKSPACE
from factorctl.config.evaluate import Controls, EvalConfig
from factorctl.errors import ResourceError, UsageError

if TYPE_CHECKING:
    from factorctl.cli.render import Table
    from factorctl.pipeline.evaluate.plan import EvalPlan
    from factorctl.pipeline.evaluate.report import ReportTable
    from factorctl.pipeline.evaluate.result import EvalResult


def evaluate(
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            metavar="[CKPT]",
            help="A checkpoint, export, Hugging Face directory or Hub id. [default: the newest in the workspace]",
        ),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option("--tasks", help="lm-eval tasks, a list; paper stands for FactorLLM's eight.")
    ] = None,
    task_data: Annotated[
        Path | None, typer.Option("--task-data", help="Directory with TASK.jsonl files, instead of the Hub.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="Text for perplexity: files, folder, Hub dataset; may be repeated."),
    ] = None,
    text_field: TextFieldOpt = None,
    data_tokens: Annotated[str, typer.Option("--data-tokens", help="Tokens taken from each text: 100K.")] = "100K",
    document_tokens: Annotated[
        int | None, typer.Option("--document-tokens", help="Tokens from the beginning of each document. [default: all]")
    ] = None,
    window: Annotated[
        int, typer.Option("--window", help="Tokens that a prediction may look at; at most the model's context.")
    ] = EvalConfig.window,
    stride: Annotated[
        int | None, typer.Option("--stride", help="Tokens between two windows. [default: half the window]")
    ] = None,
    controls: Annotated[
        bool,
        typer.Option(
            "--controls",
            help="Also static pruning, with and without refit, random and oracle routing, all experts on.",
        ),
    ] = False,
    controls_all: Annotated[
        bool, typer.Option("--controls-all", help="The same, and FFN-SkipLLM and MoEfication's split.")
    ] = False,
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration", help="Text that controls are calibrated on. [default: the checkpoint's, or self]"
        ),
    ] = None,
    calibration_tokens: Annotated[str, typer.Option("--calibration-tokens", help="Tokens of it.")] = "16384",
    fidelity: Annotated[
        bool, typer.Option("--fidelity/--no-fidelity", help="Hold every factored FFN against its dense one.")
    ] = True,
    against: Annotated[
        str | None,
        typer.Option("--against", help="Model to compare with. [default: the dense source in the manifest]"),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Documents per task. [default: all]")] = None,
    few_shot: Annotated[
        int | None, typer.Option("--few-shot", help="Examples before each question. [default: the task's own number]")
    ] = None,
    batch_size: Annotated[
        str, typer.Option("--batch-size", help="Sequences at once in tasks; auto finds what memory holds.")
    ] = "auto",
    samples: Annotated[
        Path | None, typer.Option("--samples", help="Directory for samples_*.jsonl. [default: --out]")
    ] = None,
    report: Annotated[Path | None, typer.Option("--report", help="Write a Markdown report here.")] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--compare", help="Lay two finished reports side by side instead of evaluating."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what an interrupted run finished and is still the same.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Directory of results.json, answers and picture. [default: in the workspace]"),
    ] = None,
    workspace: WorkspaceOpt = DEFAULT_WORKSPACE,
    seed: SeedOpt = 0,
    device: DeviceOpt = "auto",
    dtype: DTypeOpt = "auto",
    dry_run: DryRunOpt = False,
    output: FormatOpt = "text",
    quiet: QuietOpt = False,
) -> None:
    """Say what factoring cost: perplexity, tasks and layer fidelity beside the dense source, and beside controls.

    Both models are measured in the same run, on the same text and prompts, in the same dtype; differences are paired.

    Examples:

        factorctl eval --data notes.jsonl --controls

        factorctl eval runs/demo-1R4E2K --tasks paper --task-data bench --limit 200 --report eval.md

        factorctl eval --compare runs/a-eval/results.json runs/b-eval/results.json
    """
    from factorctl.cli.render import progress_listener
    from factorctl.quantities import parse_token_count

    if compare is not None:
        _show_comparison(list(compare), output)
        return
    config = EvalConfig(
        checkpoint=checkpoint,
        against=against,
        tasks=tuple(name.strip() for name in (tasks or "").split(",") if name.strip()),
        task_data=task_data,
        data=tuple(data or ()),
        text_field=text_field,
        data_tokens=parse_token_count(data_tokens, "--data-tokens"),
        document_tokens=document_tokens,
        window=window,
        stride=stride,
        fidelity=fidelity,
        controls=_controls(controls, controls_all),
        calibration=calibration,
        calibration_tokens=parse_token_count(calibration_tokens, "--calibration-tokens"),
        limit=limit,
        few_shot=few_shot,
        batch_size=_batch_size(batch_size),
        samples=samples,
        report=report,
        resume=resume,
        out=out,
        workspace=workspace,
        seed=seed,
        device=device,
        dtype=dtype,
    )
    progress = progress_listener(quiet=quiet)
    if dry_run:
        from factorctl.pipeline.evaluate.plan import plan_evaluation

        _show_plan(plan_evaluation(config, progress), output)
        return
    from factorctl.pipeline.evaluate.run import evaluate as run_evaluation

    command = shlex.join(["factorctl", *sys.argv[1:]])
    try:
        result = run_evaluation(config, progress, command=command)
    except (KeyboardInterrupt, ResourceError):
        if not resume:
            progress.note("the same command with --resume reuses the measurements that are finished")
        raise
    _show_result(result, output)


def _controls(some: bool, every: bool) -> Controls:
    return "all" if every else "fast" if some else "none"


def _batch_size(text: str) -> int | Literal["auto"]:
    """'auto' or a number.

    Raises:
        UsageError: neither.
    """
    if text == "auto":
        return "auto"
    if not text.isdecimal():
        raise UsageError(f"--batch-size {text} is neither auto nor a number", "for example --batch-size 8")
    return int(text)


def _table(table: ReportTable) -> Table:
    from factorctl.cli.render import rows_table

    return rows_table(table.title, table.columns, table.rows)


def _show_result(result: EvalResult, output: OutputFormat) -> None:
    from factorctl.cli.render import show
    from factorctl.pipeline.evaluate.report import report_tables

    tables = report_tables(result)
    notes = [table.note for table in tables if table.note]
    reused = f"{result.parts['reused']} of {sum(result.parts.values())} measurements were taken from an earlier run"
    closing = [*notes, *result.remarks, *([reused] if result.parts["reused"] else [])]
    answers = [path for path in result.written if path.endswith(".jsonl")]
    written = [f"written: {path}" for path in result.written if path not in answers]
    if answers:
        written.append(f"written: {len(answers)} files samples_*.jsonl in {Path(answers[0]).parent}")
    show(result, output=output, tables=[_table(table) for table in tables], closing=[*closing, *written])


def _show_plan(plan: EvalPlan, output: OutputFormat) -> None:
    from factorctl.cli.render import gigabytes, show_plan
    from factorctl.pipeline.evaluate.plan import expected_seconds

    parts = [part for subject in plan.subjects for part in plan.parts(subject)]
    facts: dict[str, object] = {
        "checkpoint": str(plan.model.path),
        "source": plan.reference.id,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "device": plan.device.type,
        "texts": {text.name: text.tokens for text in plan.texts},
        "window": plan.window,
        "stride": plan.stride,
        "tasks": {task.name: min(task.documents, plan.config.limit or task.documents) for task in plan.tasks},
        "controls": plan.controls,
        "fidelity": plan.fidelity,
        "measurements": len(parts),
        "memory_bytes": plan.memory_bytes,
        "seconds": round(expected_seconds(plan)),
        "out": str(plan.out),
    }
    words = facts | {
        "texts": ", ".join(f"{text.name}: {text.tokens:,} tokens" for text in plan.texts) or "none",
        "tasks": ", ".join(f"{name}: {count:,}" for name, count in dict(facts["tasks"]).items()) or "none",  # type: ignore[call-overload]
        "controls": ", ".join(plan.controls) or "none",
        "memory_bytes": gigabytes(plan.memory_bytes),
        "seconds": f"about {facts['seconds']}",
    }
    show_plan(facts, words, output=output)


def _show_comparison(paths: list[Path], output: OutputFormat) -> None:
    from factorctl.cli.render import rows_table, show
    from factorctl.pipeline.evaluate.compare import compare_reports

    comparison = compare_reports(paths)
    rows = [[figure.name, *figure.values] for figure in comparison.figures]
    tables = [rows_table("Evaluations side by side", ["", *comparison.reports], rows)]
    show(asdict(comparison), output=output, tables=tables, closing=comparison.remarks)
