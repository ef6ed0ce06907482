"""Evaluation and profile reports on the checkpoint that is exported, as tables for its card."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from factorctl.errors import IntegrityError
from factorctl.files.strict_json import read_json_object

MAX_ROWS = 40
PATTERNS = ("*.json", "*/results.json")
"""Where reports lie in a workspace: files that were named, and the directories that `eval` makes."""


def report_tables(directories: Sequence[Path], manifest_sha256: str) -> dict[str, str]:
    """Title -> Markdown table, from JSON reports whose `manifest_sha256` is the checkpoint's; the newest of a kind."""
    tables: dict[str, str] = {}
    for report in _reports(directories, manifest_sha256):
        tables |= _table(report)
    return tables


def evaluation_results(directories: Sequence[Path], manifest_sha256: str) -> list[EvalResult]:
    """What the newest evaluation of the checkpoint measured, as the Hub's cards hold it."""
    evaluations = [report for report in _reports(directories, manifest_sha256) if "perplexity" in report]
    try:
        return _results(evaluations[-1]) if evaluations else []
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        return []


def _results(report: Mapping[str, Any]) -> list[EvalResult]:
    """Perplexity per text, then each task's metric; the dataset's type is the name, which is all that is known."""
    rows = [(name, "perplexity", found["model"]) for name, found in report["perplexity"].items()]
    rows += [(name, str(found["metric"]), found["model"]) for name, found in report["tasks"].items()]
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=name,
            dataset_name=name,
            metric_type=metric,
            metric_value=round(float(value), 6),
        )
        for name, metric, value in rows
    ]


def _reports(directories: Sequence[Path], manifest_sha256: str) -> list[Mapping[str, Any]]:
    """Reports on this checkpoint, oldest first."""
    found = {
        Path(os.path.realpath(path))
        for directory in directories
        for pattern in PATTERNS
        for path in directory.glob(pattern)
    }
    reports = [
        _report(path) for path in sorted(filter(os.path.isfile, found), key=lambda path: path.stat().st_mtime_ns)
    ]
    return [report for report in reports if report.get("manifest_sha256") == manifest_sha256]


def _table(report: Mapping[str, Any]) -> dict[str, str]:
    """Title -> table of one report; nothing for what only looks like one of ours."""
    try:
        if "latency" in report:
            return {"Profile": numbers_table(report)}
        return {"Evaluation": evaluation_table(report)} if "perplexity" in report else {}
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        return {}


def evaluation_table(report: Mapping[str, Any]) -> str:
    """The model and the dense one, text by text and task by task, then what was kept."""
    rows = [f"| perplexity, {name} | {_pair(found)} | |" for name, found in report["perplexity"].items()]
    for name, found in report["tasks"].items():
        rows.append(f"| {name} ({found['metric']}) | {_pair(found)} | {_share(found['kept'])} |")
    average = report["average"]
    if average["kept"] is not None:
        rows.append(f"| average kept | | | {_share(average['kept'])} |")
        rows.append(f"| average kept above chance | | | {_share(average['kept_above_chance'])} |")
    return "\n".join(["| | dense | this model | kept |", "|---|---:|---:|---:|", *rows])


def _pair(found: Mapping[str, Any]) -> str:
    return f"{found['dense']:.4g} | {found['model']:.4g}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def numbers_table(report: Mapping[str, Any]) -> str:
    """The figures of a report, two levels deep."""
    rows = [f"| {name} | {value:.4g} |" for name, value in _numbers(report)][:MAX_ROWS]
    return "\n".join(["| | |", "|---|---:|", *rows])


def _numbers(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, item in value.items():
        if isinstance(item, (int, float)) and not isinstance(item, bool):
            yield f"{prefix}{key}", item
        elif isinstance(item, dict) and not prefix:
            yield from _numbers(item, f"{key}.")


def _report(path: Path) -> Mapping[str, Any]:
    """The report, or nothing where the file is none: other people's JSON may lie here."""
    try:
        return read_json_object(path)
    except IntegrityError:
        return {}
