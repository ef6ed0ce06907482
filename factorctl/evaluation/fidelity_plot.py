"""fidelity.png: errors and agreement over the layers, and the load of every expert."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from factorctl.evaluation.fidelity import LayerFidelity


def draw_fidelity(layers: Sequence[LayerFidelity], *, title: str, chance: float | None) -> bytes:
    """A PNG.

    Args:
        chance: agreement that a random choice would reach, K/N; None where nothing is routed.
    """
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    FigureCanvasAgg(figure)  # whatever backend the user has set up: no display is needed
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    _draw_errors(left, layers, chance)
    _draw_load(figure, right, layers)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()


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


def _draw_load(figure: Figure, axes: Axes, layers: Sequence[LayerFidelity]) -> None:
    axes.set_title("Load of the experts")
    if not layers[0].load:
        axes.text(0.5, 0.5, "nothing is routed", ha="center", va="center")
        axes.set_axis_off()
        return
    even = sum(layers[0].load) / len(layers[0].load)
    shares = [[share / even for share in layer.load] for layer in layers]
    image = axes.imshow(shares, aspect="auto", vmin=0, vmax=2, cmap="magma", interpolation="nearest")
    axes.set(xlabel="expert", ylabel="layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=axes, label="share of tokens / even share")
