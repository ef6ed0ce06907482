"""training.png: how the losses went and where the tokens go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from factorctl.files.publishing import write_file
from factorctl.reporting.pictures import draw_load, png

PLOT_NAME = "training.png"
LOSSES = {
    "lm": "language model",
    "kd": "distillation",
    "par": "PAR",
    "mse": "layer MSE",
    "balance": "balance",
    "z": "z",
}


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
