"""frontier.png: what is lost against measured speed, routed beside static, the front drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from factorctl.config.frontier import FrontierConfig
from factorctl.pipeline.frontier.points import Point, front
from factorctl.reporting.pictures import png

LOOKS = {"routed": ("#c0392b", "o"), "static": ("#1f77b4", "s")}


def draw_frontier(
    points: Sequence[Point], config: FrontierConfig, *, chosen: str | None, title: str, note: str
) -> bytes:
    """A PNG: each measured point by its speed-up and the loss it adds per token; the chosen one ringed."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    measured = [point for point in points if point.measured]
    best = front(measured, config.phase)
    axes.plot(*_places([*best], config), color="#555555", linewidth=1.2, zorder=1, label="front")
    axes.scatter([1.0], [0.0], marker="*", s=120, color="black", zorder=3, label="dense")
    for kind, (colour, marker) in LOOKS.items():
        _draw_kind(axes, [point for point in measured if point.kind == kind], config, kind, colour, marker)
    ringed = [point for point in measured if point.name == chosen]
    if ringed:
        axes.scatter(*_places(ringed, config), s=220, facecolors="none", edgecolors="black", linewidths=1.5, zorder=4)
    if config.speed_up is not None:
        axes.axvline(config.speed_up, color="#999999", linewidth=0.8, linestyle="--")
    axes.set(
        xlabel=f"{config.phase}: times as fast as the dense model (batch {config.batch}, prompt {config.prompt})",
        ylabel="ln(perplexity / dense perplexity)",
        title=title,
        ylim=(0, None),
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", title="hollow: another point is better and faster", title_fontsize="small")
    figure.supxlabel(note, fontsize=7, color="#555555")
    return png(figure)


def _places(points: Sequence[Point], config: FrontierConfig) -> tuple[list[float], list[float]]:
    return [point.speed_up(config.phase) for point in points], [_loss(point) for point in points]


def _loss(point: Point) -> float:
    """Nats per token on top of the dense model's."""
    return -math.log(point.kept("perplexity"))


def _draw_kind(
    axes: Axes, points: Sequence[Point], config: FrontierConfig, kind: str, colour: str, marker: str
) -> None:
    """Filled where a point lies on the front, hollow where it loses to another; the share that is active beside it."""
    for on_front in (True, False):
        some = [point for point in points if (point.dominated_by is None) == on_front]
        if some:
            face = colour if on_front else "white"
            label = kind if on_front or not any(point.dominated_by is None for point in points) else None
            axes.scatter(
                *_places(some, config), marker=marker, s=45, facecolors=face, edgecolors=colour, zorder=2, label=label
            )
    for point in points:
        place = (point.speed_up(config.phase), _loss(point))
        axes.annotate(
            f"{point.active_ffn_fraction:.0%}", place, (5, 4), textcoords="offset points", fontsize=7, color=colour
        )
