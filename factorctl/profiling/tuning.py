"""Timing the execution paths on this machine, and turning the times into a ladder."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from factorctl.ffn.choice import Site, site_of
from factorctl.ffn.layer import FactoredFFN
from factorctl.ffn.paths import PathName, Steps
from factorctl.models.building import factored_ffns
from factorctl.profiling.attribution import streamed_layers
from factorctl.profiling.expert_load import RoutedText
from factorctl.profiling.runtime import synchronised_clock
from factorctl.progress import Progress

TOKEN_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
ROUNDS, MIN_ROUNDS = 15, 4
SECONDS = 10.0
"""Begin no further round at one token count after this long."""
MARGIN = 0.97
"""Another path than the one that serves fewer tokens must be at least 3% faster: noise makes no step."""

Timings = dict[int, dict[PathName, float]]
"""Tokens -> path -> median milliseconds of one layer."""


def model_site(model: PreTrainedModel) -> Site:
    """What the choice of paths in this model depends on; all its layers are alike."""
    ffn = next(iter(factored_ffns(model)))
    weight = ffn.gate_up
    kernel = ffn.kernel() is not None
    return site_of(weight.device, weight.dtype, ffn.hidden_size, ffn.shape, kernel=kernel)


def candidates(site: Site) -> tuple[PathName, ...]:
    """Paths that may be chosen here: none that waits for the GPU, none that the sizes rule out."""
    grouped: tuple[PathName, ...] = ("grouped",) if site.can_group else ()
    if site.cuda:
        return ("slot", "masked", *grouped)
    kernel: tuple[PathName, ...] = ("kernel",) if site.kernel else ()
    return (*kernel, "loop", "masked", *grouped)


@torch.no_grad()
def time_paths(model: PreTrainedModel, text: RoutedText, progress: Progress) -> Timings:
    """Every candidate at every token count, interleaved, on the text's own FFN inputs."""
    site = model_site(model)
    timings: Timings = {}
    with progress.stage("Timing execution paths", total=len(TOKEN_COUNTS), unit="token counts") as task:
        for tokens in TOKEN_COUNTS:
            timings[tokens] = _time_candidates(streamed_layers(model, text, tokens), candidates(site))
            task.advance(tokens=tokens)
    return timings


def _time_candidates(
    layers: Sequence[tuple[FactoredFFN, torch.Tensor]], paths: Sequence[PathName]
) -> dict[PathName, float]:
    clock = synchronised_clock(layers[0][1].device)
    times: dict[PathName, list[float]] = {path: [] for path in paths}
    before = [ffn.path for ffn, _ in layers]
    begun = clock()
    try:
        for done in range(ROUNDS + 1):
            if done > MIN_ROUNDS and clock() - begun > SECONDS:
                break
            for path in paths if done % 2 else paths[::-1]:
                start = clock()
                for ffn, x_TD in layers:
                    ffn.path = path
                    ffn(x_TD)
                times[path].append((clock() - start) * 1e3 / len(layers))
    finally:
        for (ffn, _), path_before in zip(layers, before, strict=True):
            ffn.path = path_before
    return {path: statistics.median(found[1:]) for path, found in times.items()}


def ladder(timings: Mapping[int, Mapping[PathName, float]]) -> Steps:
    """The fastest path per token count as steps; a step ends halfway, geometrically, to where the next one won.

    Example: masked at 1 to 8 tokens, grouped from 16 on -> ((11, "masked"), (None, "grouped")).
    """
    counts = sorted(timings)
    chosen = min(timings[counts[0]], key=timings[counts[0]].__getitem__)
    steps = []
    for fewer, more in itertools.pairwise(counts):
        fastest = min(timings[more], key=timings[more].__getitem__)
        if chosen not in timings[more] or timings[more][fastest] < MARGIN * timings[more][chosen]:
            steps.append((int((fewer * more) ** 0.5), chosen))
            chosen = fastest
    return (*steps, (None, chosen))
