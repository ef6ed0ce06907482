"""Pictures of reports: how they become PNG, and the one that all of them have."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def png(figure: Figure, *, dpi: int = 120) -> bytes:
    """The figure, rendered whatever backend the user has set up: no display is needed."""
    FigureCanvasAgg(figure)
    with io.BytesIO() as image:
        figure.savefig(image, format="png", dpi=dpi)
        return image.getvalue()


def draw_load(axes: Axes, share_LN: Sequence[Sequence[float]]) -> None:
    """Layers by experts: the share of tokens that choose an expert, in multiples of an even share.

    Args:
        share_LN: every row sums to the number of active experts; empty where nothing is routed.
    """
    if not share_LN:
        axes.text(0.5, 0.5, "nothing is routed", ha="center", va="center")
        axes.set_axis_off()
        return
    even = sum(share_LN[0]) / len(share_LN[0])
    shares = [[share / even for share in row] for row in share_LN]
    image = axes.imshow(shares, aspect="auto", vmin=0, vmax=2, cmap="magma", interpolation="nearest")
    axes.set(xlabel="expert", ylabel="layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.figure.colorbar(image, ax=axes, label="share of tokens / even share")
