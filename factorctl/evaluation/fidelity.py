"""How true each factored FFN is to the dense one, on what the factored model itself feeds it: measured and drawn.

Every layer is judged on its own input, behind all factored layers below it: y is what its factored FFN gives there, t
what its dense FFN would give. The router is held against the labels that this t gives (`ffn.labels`). All
tokens go through in one pass, so that each dense FFN is read once and one of them is in memory at a time.

B windows, L tokens, T = B*L, D hidden_size, N num_experts, K top_k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from transformers import PreTrainedModel

from factorctl.ffn.labels import Teacher, agreement, dead_experts, expert_counts, par_labels
from factorctl.ffn.layer import FactoredFFN
from factorctl.models.building import factored_ffns
from factorctl.models.hooks import watched
from factorctl.progress import Progress
from factorctl.reporting.pictures import draw_load, png


@dataclass(frozen=True)
class LayerFidelity:
    """One layer. What only routing gives is None where nothing is routed (K = 0 or K = N)."""

    layer: int
    relative_error: float
    """sqrt( sum_t ||y - t||^2 / sum_t ||t||^2 ): a few tokens with massive activations can decide it."""
    median_error: float
    """Median over tokens of ||y - t|| / ||t||: what an ordinary token sees."""
    agreement: float | None
    """Share of the teacher's labels that the router chose; K/N is chance."""
    load: list[float]
    """Per expert, the share of tokens that choose it; sums to K."""
    load_entropy: float | None
    """Of the load, over ln N: 1 when all experts are used alike."""
    router_entropy: float | None
    """Of the router's softmax over all experts, mean over tokens, over ln N: 1 for a router without an opinion."""
    dead_experts: list[int]
    """Chosen by less than a hundredth of an even share."""


@torch.no_grad()
def measure_fidelity(
    model: PreTrainedModel, ids_BL: torch.Tensor, teacher_of: Callable[[int], Teacher], progress: Progress
) -> list[LayerFidelity]:
    """One forward pass over `ids_BL`, every factored FFN looked at as it runs.

    Args:
        teacher_of: gives the dense FFN of a layer; called once per layer, in order, and let go of behind it.
    """
    found: list[LayerFidelity] = []
    ffns = list(factored_ffns(model))
    with progress.stage("Layer fidelity", total=len(ffns), unit="layers") as task:

        def look(ffn: FactoredFFN, inputs: tuple[torch.Tensor], y: torch.Tensor) -> None:
            layer = len(found)
            found.append(layer_fidelity(layer, ffn, inputs[0].flatten(0, -2), y.flatten(0, -2), teacher_of(layer)))
            task.advance(layer=layer, error=found[-1].relative_error)

        with watched(ffns, after=look):
            model(ids_BL.to(model.device), use_cache=False, logits_to_keep=1)
    return found


def layer_fidelity(
    layer: int, ffn: FactoredFFN, x_TD: torch.Tensor, y_TD: torch.Tensor, teacher: Teacher
) -> LayerFidelity:
    """Errors and routing of one FFN on its inputs."""
    t_TD = teacher(x_TD)
    wrong_T, right_T = (y_TD - t_TD).float().square().sum(1), t_TD.float().square().sum(1)
    tiny = torch.finfo(torch.float32).tiny
    errors = {
        "relative_error": math.sqrt(float(wrong_T.double().sum()) / max(float(right_T.double().sum()), tiny)),
        "median_error": float((wrong_T / right_T.clamp_min(tiny)).sqrt().median()),
    }
    if not ffn.routes:
        return LayerFidelity(layer, **errors, agreement=None, load=[], load_entropy=None, router_entropy=None,
                             dead_experts=[])  # fmt: skip
    chosen_TK = ffn.route(x_TD).ids_TK
    labels_TK = par_labels(ffn, x_TD, t_TD.to(x_TD.dtype), 1 / ffn.scale_a)
    load_N = expert_counts(chosen_TK, ffn.shape.num_experts) / len(x_TD)
    return LayerFidelity(
        layer,
        **errors,
        agreement=float(agreement(chosen_TK, labels_TK)),
        load=[round(share, 6) for share in load_N.tolist()],
        load_entropy=_entropy(load_N / load_N.sum()),
        router_entropy=_entropy(ffn.router_logits(x_TD).float().softmax(-1)),
        dead_experts=[expert for _, expert in dead_experts([load_N.tolist()], ffn.top_k)],
    )


def _entropy(shares: torch.Tensor) -> float:
    """Entropy of distributions along the last dimension over that of the uniform one, mean over the others."""
    nats = torch.special.entr(shares).sum(-1)
    return float(nats.mean()) / math.log(shares.shape[-1])


def draw_fidelity(layers: Sequence[LayerFidelity], *, title: str, chance: float | None) -> bytes:
    """A PNG: errors and agreement over the layers, and the load of every expert.

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
