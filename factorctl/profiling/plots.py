"""Three plots as PNG: speed-up over batch and prompt, where the FLOPs go, how loaded each expert is."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from factorctl.profiling.report import ProfileResult
from factorctl.reporting.pictures import draw_load, png

LOSING, WINNING = "#c0392b", "#1f77b4"
PARTS = {
    "ffn": "FFN",
    "router": "router",
    "attention_projections": "attention projections",
    "attention_core": "attention core",
    "head": "head",
}


def speedup_plot(result: ProfileResult) -> Figure:
    """A bar per regime with its interval, ceiling as a tick; regimes that lose are red."""
    rows = result.latency
    figure = Figure(figsize=(8, 1.2 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(rows))[::-1]
    medians = np.array([row.speedup.median for row in rows])
    errors = np.array([[row.speedup.median - row.speedup.low, row.speedup.high - row.speedup.median] for row in rows]).T
    colours = [LOSING if row.loses else WINNING for row in rows]
    axes.barh(places, medians, xerr=errors.clip(min=0), color=colours, height=0.6, capsize=3)
    axes.scatter([row.ceiling for row in rows], places, marker="|", s=300, color="black", label="roofline ceiling")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(places, [f"{row.phase}, batch {row.batch}, prompt {row.tokens} ({row.path})" for row in rows])
    axes.set_xlabel("times faster than the dense model in the same runtime (95% interval)")
    axes.set_title(f"{result.notation} on {result.hardware.device}, {result.hardware.dtype}")
    axes.legend(loc="lower right")
    return figure


def flops_plot(result: ProfileResult) -> Figure:
    """Stacked parts: dense, active, executed."""
    counts: Mapping[str, Mapping[str, float]] = {
        "dense": result.flops.dense,
        f"{result.notation}\nactive": result.flops.model,
        f"{result.notation}\nexecuted": result.flops.executed,
    }
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    bottom = np.zeros(len(counts))
    for part, title in PARTS.items():
        heights = np.array([count[part] / 1e9 for count in counts.values()])
        axes.bar(list(counts), heights, bottom=bottom, label=title, width=0.6)
        bottom += heights
    axes.set_ylabel(f"GFLOPs for a prompt of {result.flops.tokens} tokens")
    axes.legend()
    return figure


def load_plot(result: ProfileResult) -> Figure:
    """Layers by experts: how loaded each is."""
    figure = Figure(figsize=(7, 1.5 + 0.18 * len(result.expert_load)), layout="constrained")
    draw_load(figure.subplots(), [load.share for load in result.expert_load])
    return figure


def draw(result: ProfileResult) -> dict[str, bytes]:
    """PNG bytes by name; the load heatmap is left out where nothing is routed."""
    plots: dict[str, Callable[[ProfileResult], Figure]] = {"speedup": speedup_plot, "flops": flops_plot}
    if result.expert_load:
        plots["expert_load"] = load_plot
    with matplotlib.rc_context({"font.size": 9}):
        return {name: png(plot(result), dpi=130) for name, plot in plots.items()}
