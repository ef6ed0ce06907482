"""Reports of earlier evaluations laid side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from factorctl.errors import UsageError
from factorctl.files.strict_json import read_json_object
from factorctl.pipeline.evaluate.result import RESULTS_NAME

Report = Mapping[str, Any]


@dataclass(frozen=True)
class ComparedFigure:
    """One figure in every report; None where a report lacks it."""

    name: str
    values: list[float | str | None]


@dataclass(frozen=True)
class Comparison:
    """What `eval --compare` shows."""

    reports: list[str]
    figures: list[ComparedFigure]
    remarks: list[str] = field(default_factory=list)
    """Why figures of different reports are not alike."""


def compare_reports(paths: Sequence[Path]) -> Comparison:
    """Read reports and put their figures in rows.

    Raises:
        UsageError: fewer than two, or one is no report of an evaluation.
        IntegrityError: one is no JSON.
    """
    if len(paths) < 2:
        raise UsageError("--compare needs two reports", "for example --compare a/results.json b/results.json")
    reports = [read_report(path) for path in paths]
    figures: dict[str, list[float | str | None]] = {}
    for index, report in enumerate(reports):
        for name, value in _figures(report):
            figures.setdefault(name, [None] * len(reports))[index] = value
    return Comparison(
        [str(path) for path in paths],
        [ComparedFigure(name, values) for name, values in figures.items()],
        list(differing_options(reports)),
    )


def read_report(path: Path) -> Report:
    """A results.json; a directory stands for the one in it.

    Raises:
        UsageError: it is no report of `factorctl eval`.
    """
    file = path / RESULTS_NAME if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"{file} does not exist", f"give the {RESULTS_NAME} of an evaluation, or its directory")
    report = read_json_object(file)
    if not _has_figures(report):
        raise UsageError(f"{file} is no report of `factorctl eval`", f"give its {RESULTS_NAME}")
    return report


def _has_figures(report: Report) -> bool:
    """Whether everything that is shown of a report is there: other people's JSON may have been named."""
    try:
        shown: list[object] = [value for _, value in _figures(report)]
        shown += differing_options([report])
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        return False
    return all(value is None or isinstance(value, str | int | float) for value in shown)


def _figures(report: Report) -> Iterator[tuple[str, float | str | None]]:
    """The report's figures in the order in which they are shown."""
    yield "checkpoint", report.get("checkpoint")
    yield "source", report.get("source")
    yield "notation", report.get("notation")
    yield "active FFN", report.get("active_ffn_fraction")
    for name, found in report["perplexity"].items():
        yield f"perplexity, {name}", found["model"]
        yield f"  dense, {name}", found["dense"]
        yield f"  ln difference, {name}", found["log_difference"]
    for name, found in report["tasks"].items():
        yield f"{name}, {found['metric']}", found["model"]
        yield f"  dense, {name}", found["dense"]
    yield "kept", report["average"].get("kept")
    yield "kept above chance", report["average"].get("kept_above_chance")
    for control in report["controls"].values():
        for text, value in control["perplexity"].items():
            yield f"{control['title']}: perplexity, {text}", value
        if control["task_average"] is not None:
            yield f"{control['title']}: task average", control["task_average"]


def differing_options(reports: Sequence[Report]) -> Iterator[str]:
    """Options that make the same figure mean different things."""
    for option in ("window", "stride", "data_tokens", "document_tokens", "limit", "few_shot", "seed"):
        values = [report["config"].get(option) for report in reports]
        if any(value != values[0] for value in values):
            yield f"--{option.replace('_', '-')} differs: {', '.join(str(value) for value in values)}"
    dtypes = [report.get("hardware", {}).get("dtype") for report in reports]
    if len(set(dtypes)) > 1:
        yield f"the dtype differs: {', '.join(map(str, dtypes))}"
    for kind in ("perplexity", "tasks"):
        for name in dict.fromkeys(name for report in reports for name in report[kind]):
            denses = [report[kind][name]["dense"] for report in reports if name in report[kind]]
            if max(denses) - min(denses) > 1e-6 * max(1.0, max(denses)):
                yield f"{name}: the dense models score differently, so texts, sources or documents differ"
