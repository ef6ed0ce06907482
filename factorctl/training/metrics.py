"""What a run writes down of its steps: metrics.jsonl, a line each and whole also after a kill, and its picture."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from factorctl.files.publishing import writable, write_file
from factorctl.reporting.pictures import draw_load, png

METRICS_NAME = "metrics.jsonl"
PLOT_NAME = "training.png"
LOSSES = {
    "lm": "language model",
    "kd": "distillation",
    "par": "PAR",
    "mse": "layer MSE",
    "balance": "balance",
    "z": "z",
}


class MetricsFile:
    """Appends lines; `keep_until` forgets what a resumed run is about to do again."""

    def __init__(self, run: Path) -> None:
        self.path = run / METRICS_NAME

    def append(self, line: dict[str, Any]) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        with writable(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite, allow_nan=False) + "\n")

    def keep_until(self, step: int) -> None:
        """Drop the lines of later steps, and a last line that a kill cut short."""
        kept = [line for line in self.lines() if line.get("step", 0) <= step]
        write_file(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def lines(self) -> Iterator[dict[str, Any]]:
        """Every whole line."""
        if not self.path.exists():
            return
        for raw in self.path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(raw)
            except ValueError:
                return
            if isinstance(line, dict):
                yield line


def draw_training(run: Path, lines: Sequence[dict[str, Any]], load: Sequence[Sequence[float]], title: str) -> Path:
    """Write the picture: loss parts over tokens, and the held-out load of every expert of every layer.

    Args:
        lines: of metrics.jsonl.
        load: share of tokens per layer and expert; empty where nothing is routed.
    """
    figure = Figure(figsize=(11, 4.2))  # no pyplot: it would pick a display backend
    figure.subplots_adjust(left=0.06, right=0.97, bottom=0.12, top=0.84, wspace=0.2)
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    _draw_losses(left, lines)
    right.set_title("Load of the experts, held-out text")
    draw_load(right, load)
    write_file(run / PLOT_NAME, png(figure))
    return run / PLOT_NAME


def _draw_losses(axes: Axes, lines: Sequence[dict[str, Any]]) -> None:
    for name, label in LOSSES.items():
        points = [(line["tokens"], line[name]) for line in lines if line.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1.2)
    axes.set(xlabel="tokens", ylabel="loss, before its weight", title="Losses")
    if axes.lines:
        axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
