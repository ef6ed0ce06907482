"""Where the time of a factored FFN goes: its path, the weights it reads, and what deciding costs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from factorctl.ffn.kernel.cpu import FFNWeights, KernelFFN
from factorctl.ffn.layer import FactoredFFN
from factorctl.ffn.paths import PathName
from factorctl.models.building import factored_ffns
from factorctl.profiling.expert_load import RoutedText, mean_hits
from factorctl.profiling.flops import experts_run_by
from factorctl.profiling.runtime import Clock, synchronised_clock
from factorctl.profiling.sizes import ModelSizes

ROUNDS, MIN_ROUNDS = 20, 5
SECONDS = 10.0
"""Begin no further round of one comparison after this long."""
STREAM_BYTES = 256 << 20
"""More weights than any cache holds: as many layers take turns as it takes to reach it."""


@dataclass(frozen=True)
class FfnCost:
    """One FFN layer at one number of tokens, averaged over the layers."""

    tokens: int
    path: PathName
    ffn_ms: float
    """Median of a whole layer's time, on the text's own FFN inputs."""
    dense_ms: float
    """The same layer with all experts on."""
    routing_share: float
    """Router product, top-k and gate over the layer's time; the path's own gathering is not in it."""
    experts_hit: float
    """Experts that some token chose."""
    weight_mbytes: float
    """FFN weights that the path reads."""
    dense_weight_mbytes: float
    executed_share: float
    """FLOPs that the path executes over the dense FFN's; the active share is K/N."""


@torch.no_grad()
def ffn_cost(model: PreTrainedModel, sizes: ModelSizes, text: RoutedText, tokens: int, itemsize: int) -> FfnCost:
    """Time layers in turn, so that weights come from memory as they do in the model."""
    layers = streamed_layers(model, text, tokens)
    ffns = [ffn for ffn, _ in layers]
    top_k, num_experts = sizes.shape.top_k, sizes.shape.num_experts
    clock = synchronised_clock(layers[0][1].device)

    def run(active: int) -> None:
        for ffn, x_TD in layers:
            ffn.top_k = active
            ffn(x_TD)
            ffn.top_k = top_k

    def route() -> None:
        for ffn, x_TD in layers:
            ffn.route(x_TD)

    path = ffns[0].path_for(tokens)
    ffn_ms, dense_ms = _medians_ms([lambda: run(top_k), lambda: run(num_experts)], clock)
    if not sizes.routes:
        routing_ms = 0.0
    elif path == "kernel":
        routing_ms = _kernel_routing_ms(layers, clock)
    else:
        routing_ms = _medians_ms([route], clock)[0]
    hits = mean_hits(text.loads, top_k, tokens)
    read = num_experts if path in ("masked", "dense") else hits
    shape, neuron_bytes = sizes.shape, sizes.neuron_weights * itemsize
    return FfnCost(
        tokens=tokens,
        path=path,
        ffn_ms=ffn_ms / len(ffns),
        dense_ms=dense_ms / len(ffns),
        routing_share=routing_ms / ffn_ms,
        experts_hit=hits,
        weight_mbytes=(shape.shared_size + read * shape.expert_size) * neuron_bytes / 1e6,
        dense_weight_mbytes=shape.intermediate_size * neuron_bytes / 1e6,
        executed_share=(shape.shared_size + experts_run_by(path, sizes) * shape.expert_size) / shape.intermediate_size,
    )


def _kernel_routing_ms(layers: Sequence[tuple[FactoredFFN, torch.Tensor]], clock: Clock) -> float:
    """What the kernel takes longer when it routes than when it is told the experts, which have no neurons here: next to
    those of a layer the difference would be lost in the noise.
    """
    routings = [ffn.route(x_TD) for ffn, x_TD in layers]
    routers = [_without_neurons(ffn) for ffn, _ in layers]

    def choose() -> None:
        for router, (_, x_TD) in zip(routers, layers, strict=True):
            router(x_TD)

    def obey() -> None:
        for router, (_, x_TD), routing in zip(routers, layers, routings, strict=True):
            router(x_TD, *routing)

    choosing_ms, obeying_ms = _medians_ms([choose, obey], clock)
    return max(0.0, choosing_ms - obeying_ms)


def _without_neurons(ffn: FactoredFFN) -> KernelFFN:
    weights = FFNWeights(ffn.gate_up, None, ffn.down, ffn.router)
    shape = replace(ffn.shape, expert_size=0, shared_size=0)
    return KernelFFN(weights, shape, activation=ffn.activation_name, gate=ffn.gate, scale_a=ffn.scale_a)


def streamed_layers(model: PreTrainedModel, text: RoutedText, tokens: int) -> list[tuple[FactoredFFN, torch.Tensor]]:
    """FFNs with `tokens` of their own inputs: enough of them, evenly spread, that no cache holds their weights."""
    ffns = list(factored_ffns(model))
    bytes_each = sum(parameter.nbytes for parameter in ffns[0].parameters())
    stride = max(1, len(ffns) * bytes_each // max(STREAM_BYTES, bytes_each))
    pairs = list(zip(ffns, text.inputs_LTD, strict=True))[::stride]
    return [(ffn, repeat_to(x_TD, tokens)) for ffn, x_TD in pairs]


def _medians_ms(runs: list[Callable[[], None]], clock: Clock) -> list[float]:
    """Interleaved medians, after one run of each to warm up."""
    times: list[list[float]] = [[] for _ in runs]
    begun = clock()
    for done in range(ROUNDS + 1):
        if done > MIN_ROUNDS and clock() - begun > SECONDS:
            break
        for run, found in zip(runs, times, strict=True):
            start = clock()
            run()
            found.append((clock() - start) * 1e3)
    return [statistics.median(found[1:]) for found in times]


def repeat_to(x_TD: torch.Tensor, tokens: int) -> torch.Tensor:
    """The first `tokens` rows, starting over where there are fewer."""
    return x_TD[torch.arange(tokens, device=x_TD.device) % x_TD.shape[0]]
