"""fidelity.png: errors and agreement over the layers, and the load of every expert."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from factorctl.evaluation.fidelity import LayerFidelity
from factorctl.reporting.pictures import draw_load, png


def draw_fidelity(layers: Sequence[LayerFidelity], *, title: str, chance: float | None) -> bytes:
    """A PNG.

    Args:
        chance: agreement that a random choice would reach, K/N; None where nothing is routed.
    """
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    _draw_errors(left, layers, chance)
    right.set_title("Load of the experts")
    draw_load(right, [layer.load for layer in layers if layer.load])
    return png(figure)


def _draw_errors(axes: Axes, layers: Sequence[LayerFidelity], chance: float | None) -> None:
    places = [layer.layer for layer in layers]
    axes.plot(places, [layer.relative_error for layer in layers], label="relative error", color="#c0392b")
    axes.plot(places, [layer.median_error for layer in layers], label="median over tokens", color="#c0392b", ls=":")
    if chance is not None:
        agreements = [layer.agreement or 0.0 for layer in layers]
        axes.plot(places, agreements, label="router agrees with teacher", color="#1f77b4")
        axes.axhline(chance, color="#1f77b4", linewidth=0.8, ls="--", label="agreement by chance")
    axes.set(xlabel="layer", title="Factored FFN against dense FFN", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
