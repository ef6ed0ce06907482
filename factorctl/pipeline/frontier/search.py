"""The search itself: the splits of the grid, from coarse to fine, then those that a budget lies between."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from factorctl.config.frontier import FrontierConfig
from factorctl.config.shape import FactorShape
from factorctl.models.assembling import assembled
from factorctl.pipeline.frontier.exports import export_of
from factorctl.pipeline.frontier.measure import Quality, Speed, quality_of, speed_of
from factorctl.pipeline.frontier.partitions import SharedPass
from factorctl.pipeline.frontier.plan import FrontierPlan
from factorctl.pipeline.frontier.points import Point, meets, why_hopeless
from factorctl.pipeline.frontier.splits import kind_of, name_of, static_shape
from factorctl.pipeline.frontier.state import SearchState
from factorctl.pipeline.frontier.texts import SearchTexts
from factorctl.pipeline.frontier.walk import walk
from factorctl.profiling.flops import count_flops, reduction
from factorctl.profiling.sizes import ModelSizes
from factorctl.progress import Progress
from factorctl.reporting.statistics import Estimate

REFINEMENTS = 3
"""Splits between those of the grid that a budget may ask for."""
NEAR = 1 / 48
"""Of the FFN: a split so near to one that was tried is not tried."""
SAFE = 0.9
"""Of the way to where a measured quantity should just meet its budget: both ends were measured, with noise."""


@dataclass
class Search:
    """Tries splits one by one and keeps what was found."""

    plan: FrontierPlan
    texts: SearchTexts
    shared: SharedPass
    dense: Quality
    state: SearchState
    deadline: float
    """On the monotonic clock; infinite where no time was set."""
    progress: Progress
    points: list[Point] = field(default_factory=list)
    reused: int = 0
    longest: dict[str, float] = field(default_factory=dict)
    """Seconds of the longest try so far, by kind."""

    def run(self) -> list[FactorShape]:
        """Try every split that there is time for; those that there was none for are returned."""
        left: list[FactorShape] = []
        for shape in self._wanted():
            if name_of(shape) in {point.name for point in self.points}:
                continue
            if (known := self._known(shape)) is not None:
                self.points.append(known)
                self.reused += 1
            elif self._has_time_for(shape):
                self._take(shape)
            else:
                left.append(shape)
        return left

    def confirmed(self, point: Point) -> Point:
        """The point fitted once more, on a partition of its own as a recipe makes it, and timed in twice the rounds.

        A choice among many noisy measurements falls on lucky ones: what may be promised is the second measurement.
        """
        part = f"{point.name}-confirmed"
        found = self.state.found(part)
        if found is None:
            again = self._try(point.shape, rounds=2 * self.plan.config.rounds, own_partition=True)
            self.state.keep(part, found := again.to_json())
        return Point.from_json(found)

    def _wanted(self) -> Iterator[FactorShape]:
        config, width = self.plan.config, self.plan.dense.intermediate_size
        if config.active is not None:
            yield static_shape(width, math.floor(config.active * width))
        yield from self.plan.grid
        for _ in range(REFINEMENTS):
            shape = between(self.points, config, width)
            if shape is None:
                return
            yield shape

    def _known(self, shape: FactorShape) -> Point | None:
        """What an earlier run found, unless it dropped the split for what is not asked for any more."""
        found = self.state.found(name_of(shape))
        point = None if found is None else Point.from_json(found)
        if point is None or point.dropped is None:
            return point
        reason = why_hopeless(point.drift, shape, self.points, self.plan.config)
        return None if reason is None else replace(point, dropped=reason)

    def _has_time_for(self, shape: FactorShape) -> bool:
        """Whether it will end in time, if it takes as long as the longest of its kind; the first is always tried.

        With a budget there has to be time to make the chosen split once more.
        """
        expected = self.longest.get(kind_of(shape), max(self.longest.values(), default=0.0))
        left_to_do = expected * (2 if self.plan.config.has_budget else 1)
        return not self.points or time.monotonic() + left_to_do <= self.deadline

    def _take(self, shape: FactorShape) -> None:
        started = time.monotonic()
        point = self._try(shape, rounds=self.plan.config.rounds)
        seconds = time.monotonic() - started
        self.state.keep(point.name, point.to_json())
        self.longest[point.kind] = max(self.longest.get(point.kind, 0.0), seconds)
        self.points.append(point)
        if point.dropped is not None:
            self.progress.note(f"{point.name} is dropped: {point.dropped}")

    def _try(self, shape: FactorShape, *, rounds: int, own_partition: bool = False) -> Point:
        plan, texts = self.plan, self.texts

        def hopeless(drift: float) -> str | None:
            return None if own_partition else why_hopeless(drift, shape, self.points, plan.config)

        walked = walk(
            plan, shape, self.shared, texts.calibration_BL, hopeless, self.progress, own_partition=own_partition
        )
        point = self._unmeasured(shape, walked.drift)
        if walked.dropped is not None:
            return replace(point, dropped=walked.dropped)
        model = assembled(plan.dense, walked.spec, plan.reader, walked.layers, dtype=plan.dtype, device=plan.device)
        quality = quality_of(model, plan, texts, f"Judging {point.name}", self.progress)
        with self.progress.stage(f"Timing {point.name}"):
            speed = speed_of(model, plan, texts, rounds=rounds)
        del model, walked
        gc.collect()
        return self._measured(point, quality, speed)

    def _unmeasured(self, shape: FactorShape, drift: float) -> Point:
        sizes = ModelSizes.of(self.plan.dense.config, shape)
        flops, dense = (count_flops(one, self.plan.config.prompt) for one in (sizes, sizes.dense))
        export = export_of(self.plan, shape)
        return Point(
            name=name_of(shape),
            kind=kind_of(shape),
            num_experts=shape.num_experts,
            top_k=shape.top_k,
            expert_size=shape.expert_size,
            shared_size=shape.shared_size,
            active_ffn_fraction=shape.active_ffn_fraction,
            drift=drift,
            ffn_gflops=flops.ffn / 1e9,
            total_gflops=flops.total / 1e9,
            ffn_flops_reduction=reduction(dense.ffn, flops.ffn),
            total_flops_reduction=reduction(dense.total, flops.total),
            export_target=export.target,
            export_bytes=export.bytes,
            engines=export.engines,
        )

    def _measured(self, point: Point, quality: Quality, speed: Speed) -> Point:
        return replace(
            point,
            perplexity=quality.perplexity,
            accuracy=quality.accuracy,
            accuracy_kept=quality.accuracy / self.dense.accuracy if self.dense.accuracy else 0.0,
            perplexity_kept=self.dense.perplexity / quality.perplexity,
            prefill=speed.prefill,
            decode=speed.decode,
        )


def between(points: Sequence[Point], config: FrontierConfig, intermediate_size: int) -> FactorShape | None:
    """The static split that should just meet the budgets, by what lies on either side of it; None where one was tried.

    Between two splits of the grid speed and quality are taken to be linear in the neurons that are active.
    """
    if not config.has_budget:
        return None
    static = sorted(
        (point for point in points if point.kind == "static" and point.measured), key=lambda p: p.active_ffn_fraction
    )
    for smaller, larger in pairwise([*static, *map(_dense_end, static[-1:])]):
        if meets(smaller, config) == meets(larger, config):
            continue
        share = _crossing(smaller, larger, config)
        shape = static_shape(intermediate_size, round(share * intermediate_size))
        tried = [point.active_ffn_fraction for point in points if point.kind == "static"]
        if min(abs(shape.active_ffn_fraction - other) for other in tried) >= NEAR:
            return shape
    return None


def _dense_end(point: Point) -> Point:
    """The dense model as the last of the static splits: all neurons, all of the quality, its own speed."""
    same = Estimate(1.0, 1.0, 1.0)
    return replace(point, active_ffn_fraction=1.0, accuracy_kept=1.0, perplexity_kept=1.0, prefill=same, decode=same)


def _crossing(smaller: Point, larger: Point, config: FrontierConfig) -> float:
    """The share of active neurons at which the budgets that tell the two apart are met, of several the safest."""
    fits, fails = (smaller, larger) if meets(smaller, config) else (larger, smaller)
    start, way = fits.active_ffn_fraction, fails.active_ffn_fraction - fits.active_ffn_fraction
    return start + way * min(_parts_of_the_way(fits, fails, config))


def _parts_of_the_way(fits: Point, fails: Point, config: FrontierConfig) -> Iterator[float]:
    """How far from the one toward the other each budget that the other misses allows to go."""
    if config.active is not None and fails.active_ffn_fraction > config.active:
        yield (config.active - fits.active_ffn_fraction) / (fails.active_ffn_fraction - fits.active_ffn_fraction)
    if config.speed_up is not None and (value := fails.speed_up(config.phase)) < config.speed_up:
        here = fits.speed_up(config.phase)
        yield SAFE * (here - config.speed_up) / (here - value)
    if config.keep is not None and (value := fails.kept(config.keep_by)) < config.keep:
        here = fits.kept(config.keep_by)
        yield SAFE * (here - config.keep) / (here - value)
