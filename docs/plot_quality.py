"""Draw docs/quality.png: what is lost against FFN compute, routed and static, from a report of bench_routing.py.

    python docs/plot_quality.py REPORT.md --source docs/benchmarks/REPORT.md --hardware "NVIDIA H100"

What is drawn is kept in quality.json beside the picture; without a report the picture is drawn from there again.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

HERE = Path(__file__).parent
DATA, PICTURE = HERE / "quality.json", HERE / "quality.png"
TABLE = "## Excess at equal active neurons"
COLUMNS = ("split", "active", "tokens trained", "method", "options", "excess", "perplexity", "ahead of static")
COLOURS = {"routed": "#c0392b", "clustered": "#e59866", "static": "#1f77b4"}
LEAST_OF_A_LINE = 3
"""Fewer points are not joined: two say nothing of what lies between them."""


def rows_of(report: str) -> Iterator[dict[str, str]]:
    """The rows of the report's first table.

    Raises:
        ValueError: the report has no such table, or its columns are others.
    """
    _, found, rest = report.partition(TABLE)
    lines = [line for line in rest.split("\n## ")[0].splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    if not found or not cells or tuple(cells[0]) != COLUMNS:
        raise ValueError(f"no table {TABLE!r} with the columns {', '.join(COLUMNS)}")
    yield from (dict(zip(COLUMNS, row, strict=True)) for row in cells[2:])


def content_of(report: str, *, source: str, hardware: str) -> dict[str, Any]:
    """All that the picture shows: a point for every row that was not trained, or trained longest."""
    rows = list(rows_of(report))
    tokens = [int(row["tokens trained"].replace(",", "")) for row in rows]
    points = [
        {
            "method": row["method"],
            "split": row["split"],
            "tokens": trained,
            "active_percent": int(row["active"].rstrip("%")),
            "excess": float(row["excess"]),
        }
        for row, trained in zip(rows, tokens, strict=True)
        if trained in (0, max(tokens))
    ]
    measured = re.search(r"`\w+`: ([\d,]+) tokens of (\d+) documents", report)
    date = re.search(r"^\d{4}-\d\d-\d\d", report, re.MULTILINE)
    if measured is None or date is None:
        raise ValueError("the report does not say when and on which text it measured")
    note = f"{measured[1]} tokens of held-out text, {hardware}, {date[0]}; {source}"
    return {"title": "SmolLM2-135M-Instruct: what is lost, by share of the FFN", "note": note, "points": points}


def draw(content: dict[str, Any]) -> None:
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for tokens in sorted({point["tokens"] for point in content["points"]}):
        for method, colour in COLOURS.items():
            points = [point for point in content["points"] if (point["method"], point["tokens"]) == (method, tokens)]
            draw_method(axes, points, colour, f"{method}, {f'{tokens:,} tokens' if tokens else 'before training'}")
    axes.set(
        xlabel="FFN neurons that work for a token, %",
        ylabel="ln(perplexity / dense perplexity)",
        title=content["title"],
        xlim=(20, 80),
        ylim=(0, None),
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", title="all with --refit", title_fontsize="small")
    figure.text(0.5, -0.02, content["note"], ha="center", va="top", fontsize=7, color="#555555")
    figure.savefig(PICTURE, dpi=110, bbox_inches="tight")


def draw_method(axes: Axes, points: list[dict[str, Any]], colour: str, label: str) -> None:
    """Filled and joined once trained, hollow before; splits without shared neurons stand apart, by name."""
    if not points:
        return
    bare = [point for point in points if "+S" not in point["split"]]
    kept = sorted((point["active_percent"], point["excess"]) for point in points if point not in bare)
    trained = points[0]["tokens"] > 0
    face = colour if trained else "white"
    line = ("-" if trained else "--") if len(kept) >= LEAST_OF_A_LINE else ""
    marker = "s" if points[0]["method"] == "static" else "o"
    if kept:
        shares, losses = zip(*kept, strict=True)
        axes.plot(shares, losses, linestyle=line, marker=marker, color=colour, mfc=face, ms=7, label=label)
    for point in bare:
        place = (point["active_percent"], point["excess"])
        axes.plot(*place, marker="D", color=colour, mfc=face, ms=7)
        axes.annotate(
            f"{point['split']}: nothing shared", place, (-8, -3), textcoords="offset points", fontsize=8, ha="right"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", nargs="?", type=Path)
    parser.add_argument("--source", help="where the report lies in the repository [default: REPORT]")
    parser.add_argument("--hardware", default="NVIDIA H100")
    args = parser.parse_args()
    if args.report:
        source = args.source or str(args.report)
        content = content_of(args.report.read_text(encoding="utf-8"), source=source, hardware=args.hardware)
        DATA.write_text(json.dumps(content, indent=1) + "\n")
    draw(json.loads(DATA.read_text()))


if __name__ == "__main__":
    main()
