"""Draw docs/quality.png: quality kept against FFN compute, ours and the controls, from evaluation reports.

    python docs/plot_quality.py runs/a-eval/results.json runs/b-eval/results.json --note "AMD EPYC, 2026-11-22"

Each report of `factorctl eval --controls` gives a point per method. What is drawn is kept in quality.json beside the
picture; without reports the picture is drawn from there again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

HERE = Path(__file__).parent
DATA, PICTURE = HERE / "quality.json", HERE / "quality.png"
COLOURS = {
    "dense": "#222222",
    "ours": "#c0392b",
    "static pruning": "#1f77b4",
    "static pruning + refit": "#5fa2d4",
    "random routing": "#999999",
    "oracle routing": "#e59866",
    "MoEfication, untrained": "#8e6bbf",
}
MARKERS = {"dense": "*", "ours": "o"}


def points_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One point per method: its share of active FFN neurons and its perplexity over the dense model's."""
    (text,) = report["perplexity"]
    dense = report["dense"]["perplexity"][text]
    rows = [("dense", report["dense"]), ("ours", report["model"])]
    rows += [(row["title"], row) for row in report["controls"].values()]
    return [
        {
            "method": method,
            "label": report["notation"] if method == "ours" else method,
            "active_ffn_fraction": row["active_ffn_fraction"],
            "perplexity_ratio": row["perplexity"][text] / dense,
        }
        for method, row in rows
        if method in COLOURS
    ]


def draw(content: dict[str, Any]) -> None:
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for method, colour in COLOURS.items():
        found = sorted(
            (point["active_ffn_fraction"], 1 / point["perplexity_ratio"], point["label"])
            for point in content["points"]
            if point["method"] == method
        )
        if not found:
            continue
        shares, kept = [100 * share for share, _, _ in found], [100 * value for _, value, _ in found]
        on_top = 3 if method == "ours" else 2
        axes.plot(shares, kept, MARKERS.get(method, "s"), color=colour, label=method, ms=8, zorder=on_top)
        for share, value, label in found if method == "ours" else ():
            axes.annotate(label, (100 * share, 100 * value), xytext=(6, 5), textcoords="offset points", fontsize=8)
    axes.set(
        xlabel="FFN neurons that work for a token, %",
        ylabel="quality kept: dense perplexity / perplexity, %",
        title=content["title"],
        ylim=(0, 105),
        xlim=(40, 105),
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center right")
    axes.text(0.99, 0.02, content["note"], ha="right", fontsize=7, color="#555555", transform=axes.transAxes)
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="*", type=Path)
    parser.add_argument("--title", default="SmolLM2-135M-Instruct, before any training")
    parser.add_argument("--note", default="")
    args = parser.parse_args()
    if args.reports:
        points = [point for path in args.reports for point in points_of(json.loads(path.read_text()))]
        unique = list({json.dumps(point, sort_keys=True): point for point in points}.values())
        content = {"title": args.title, "note": args.note, "points": unique}
        DATA.write_text(json.dumps(content, indent=1) + "\n")
    draw(json.loads(DATA.read_text()))


if __name__ == "__main__":
    main()
