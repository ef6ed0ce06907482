"""FactorLLM's table out of finished evaluations: what each method costs, what it scores, and what it keeps.

    dense | one row per report, by its notation | the controls that the reports hold: experts at random, MoEfication,
    KnowledgeFactor

A report is what `eval` wrote of one checkpoint. All must have measured the same dense source.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from factorctl.errors import UsageError
from factorctl.files.publishing import make_directory, write_file
from factorctl.pipeline.evaluate.compare import Report, differing_options, read_report
from factorctl.pipeline.evaluate.report import markdown_table, number, percent
from factorctl.reporting.tables import ReportTable

CONTROL_ROWS = ("random_routing", "moefication", "knowledge_factor")
"""The paper's other methods, as controls."""


@dataclass(frozen=True)
class PaperRow:
    """One method."""

    method: str
    report: str
    """Where it was measured."""
    active_ffn_fraction: float | None
    attention_gflops: float | None
    ffn_gflops: float | None
    """Of a prompt of one window."""
    perplexity: Mapping[str, float]
    tasks: Mapping[str, float]
    average: float | None
    kept: float | None
    """Score over dense score, mean over tasks: the paper's relative maintenance."""
    kept_above_chance: float | None


@dataclass(frozen=True)
class PaperTable:
    """What `eval --paper-table` shows."""

    source: str
    """The dense model."""
    rows: list[PaperRow]
    remarks: list[str] = field(default_factory=list)
    """Why rows of different reports are not alike."""


def paper_table(paths: Sequence[Path]) -> PaperTable:
    """Put the rows of several reports under one another.

    Raises:
        UsageError: a path is no report of an evaluation, or the reports are of different dense models.
        IntegrityError: one is no JSON.
    """
    reports = [read_report(path) for path in paths]
    sources = {str(report["source"]): str(path) for report, path in zip(reports, paths, strict=True)}
    if len(sources) > 1:
        named = "; ".join(f"{path}: {source}" for source, path in sources.items())
        raise UsageError(f"the reports compare with different dense models ({named})", "give reports of one of them")
    titles = _titles(reports, paths)
    rows = [_row("dense", paths[0], reports[0]["dense"])]
    rows += [_row(title, path, report["model"]) for title, path, report in zip(titles, paths, reports, strict=True)]
    rows += [row for name in CONTROL_ROWS for row in _controls(name, reports, paths, titles)]
    remarks = list(differing_options(reports))
    if rows[0].attention_gflops is None:
        remarks.append("the first report holds no FLOPs: it is of no native checkpoint, or of an older version")
    return PaperTable(str(reports[0]["source"]), rows, remarks)


def _titles(reports: Sequence[Report], paths: Sequence[Path]) -> list[str]:
    """What each report's row is called: its split, and where it was measured if another one is called the same."""
    titles = [_title(report) for report in reports]
    return [
        title if titles.count(title) == 1 else f"{title}, {path}" for title, path in zip(titles, paths, strict=True)
    ]


def _title(report: Report) -> str:
    notation = str(report.get("notation") or report["checkpoint"])
    return f"KnowledgeFactor, trained ({notation})" if report.get("routing") == "domain" else notation


def _controls(name: str, reports: Sequence[Report], paths: Sequence[Path], titles: Sequence[str]) -> Iterator[PaperRow]:
    for report, path, title in zip(reports, paths, titles, strict=True):
        if (found := report["controls"].get(name)) is not None:
            yield _row(f"{found['title']} ({title})", path, found)


def _row(method: str, path: Path, found: Mapping[str, Any]) -> PaperRow:
    flops = found.get("gflops") or {}
    return PaperRow(
        method=method,
        report=str(path),
        active_ffn_fraction=found["active_ffn_fraction"],
        attention_gflops=flops.get("attention"),
        ffn_gflops=flops.get("ffn"),
        perplexity=dict(found["perplexity"]),
        tasks=dict(found["tasks"]),
        average=found["task_average"],
        kept=found["kept"],
        kept_above_chance=found["kept_above_chance"],
    )


def as_report_table(table: PaperTable) -> ReportTable:
    """The table in words; a column for every text and task that some row has."""
    texts = list(dict.fromkeys(name for row in table.rows for name in row.perplexity))
    tasks = list(dict.fromkeys(name for row in table.rows for name in row.tasks))
    perplexities = ["perplexity"] if len(texts) == 1 else [f"perplexity, {text}" for text in texts]
    scored = ["average", "kept", "kept above chance"] if tasks else []
    columns = ["method", "active FFN", "attention GFLOPs", "FFN GFLOPs", *perplexities, *tasks, *scored]
    rows = [
        [
            row.method,
            percent(row.active_ffn_fraction),
            number(row.attention_gflops, 1),
            number(row.ffn_gflops, 1),
            *(number(row.perplexity.get(text)) for text in texts),
            *(percent(row.tasks.get(task)) for task in tasks),
            *([percent(row.average), percent(row.kept), percent(row.kept_above_chance)] if tasks else []),
        ]
        for row in table.rows
    ]
    note = "GFLOPs of a prompt of one window, over all layers; the router counts as FFN. Kept: score over dense score."
    return ReportTable(f"{table.source}, method by method", columns, rows, note)


def write_paper_table(table: PaperTable, path: Path) -> None:
    """The table as Markdown."""
    parts = [markdown_table(as_report_table(table)), *(f"- {remark}" for remark in table.remarks)]
    make_directory(path.parent)
    write_file(path, ("\n\n".join(parts) + "\n").encode())
