"""training.png: how the losses went and where the tokens go."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from factorctl.checkpoint.publishing import write_file

PLOT_NAME = "training.png"
LOSSES = {
    "lm": "language model",
    "kd": "distillation",
    "par": "PAR",
    "mse": "layer MSE",
    "balance": "balance",
    "z": "z",
}


def draw_training(
    run: Path, lines: Sequence[dict[str, Any]], load: Sequence[Sequence[float]], top_k: int, title: str
) -> Path:
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
    _draw_load(figure, right, load, top_k)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_file(run / PLOT_NAME, image.getvalue())
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


def _draw_load(figure: Figure, axes: Axes, load: Sequence[Sequence[float]], top_k: int) -> None:
    axes.set_title("Load of the experts, held-out text")
    if not load:
        axes.text(0.5, 0.5, "nothing is routed", ha="center", va="center")
        axes.set_axis_off()
        return
    even = top_k / len(load[0])
    image = axes.imshow([[share / even for share in row] for row in load], aspect="auto", vmin=0, vmax=2, cmap="magma")
    axes.set(xlabel="expert", ylabel="layer")
    figure.colorbar(image, ax=axes, label="share of tokens / even share")
