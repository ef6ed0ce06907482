"""`factorctl eval`."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from factorctl.cli.command import Asked
from factorctl.cli.options import OutputFormat
from factorctl.config.evaluate import EvalConfig

if TYPE_CHECKING:
    from factorctl.pipeline.evaluate.plan import EvalPlan
    from factorctl.pipeline.evaluate.result import EvalResult


def evaluate(
    config: EvalConfig,
    asked: Asked,
    *,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--compare", help="Lay two finished reports side by side instead of evaluating."),
    ] = None,
    paper_table: Annotated[
        list[Path] | None,
        typer.Option("--paper-table", help="Put a finished report's rows into FactorLLM's table; may be repeated."),
    ] = None,
) -> None:
    """Say what factoring cost: perplexity, tasks and layer fidelity beside the dense source, and beside controls.

    Both models are measured in the same run, on the same text and prompts, in the same dtype; differences are paired.

    Examples:

        factorctl eval --data notes.jsonl --controls

        factorctl eval runs/demo-1R4E2K --tasks paper --task-data bench --limit 200 --report eval.md

        factorctl eval --compare runs/a-eval/results.json runs/b-eval/results.json

        factorctl eval --paper-table runs/1R4E3K/eval --paper-table runs/1R4E2K/eval --report table.md
    """
    from factorctl.cli.render import progress_listener

    if compare is not None:
        _show_comparison(list(compare), asked.output)
        return
    if paper_table:
        _show_paper_table(paper_table, config.report, asked.output)
        return
    progress = progress_listener(quiet=asked.quiet)
    if asked.dry_run:
        from factorctl.pipeline.evaluate.plan import plan_evaluation

        _show_plan(plan_evaluation(config, progress), asked.output)
        return
    from factorctl.pipeline.evaluate.run import evaluate as run_evaluation

    command = shlex.join(["factorctl", *sys.argv[1:]])
    _show_result(run_evaluation(config, progress, command=command), asked.output)


def _show_result(result: EvalResult, output: OutputFormat) -> None:
    from factorctl.cli.render import report_table, show
    from factorctl.pipeline.evaluate.report import report_tables

    tables = report_tables(result)
    notes = [table.note for table in tables if table.note]
    reused = f"{result.parts['reused']} of {sum(result.parts.values())} measurements were taken from an earlier run"
    closing = [*notes, *result.remarks, *([reused] if result.parts["reused"] else [])]
    answers = [path for path in result.written if path.endswith(".jsonl")]
    written = [f"written: {path}" for path in result.written if path not in answers]
    if answers:
        written.append(f"written: {len(answers)} files samples_*.jsonl in {Path(answers[0]).parent}")
    show(result, output=output, tables=[*map(report_table, tables)], closing=[*closing, *written])


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


def _show_paper_table(paths: list[Path], report: Path | None, output: OutputFormat) -> None:
    from factorctl.cli.render import report_table, show
    from factorctl.pipeline.evaluate.paper_table import as_report_table, paper_table, write_paper_table

    found = paper_table(paths)
    table = as_report_table(found)
    written = []
    if report is not None:
        write_paper_table(found, report)
        written.append(f"written: {report}")
    show(found, output=output, tables=[report_table(table)], closing=[table.note, *found.remarks, *written])
