"""What is known of a split that was tried: one point of the frontier, and which points lose to others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from factorctl.config.frontier import FrontierConfig, Kept, Phase
from factorctl.config.shape import FactorShape
from factorctl.pipeline.frontier.splits import Kind, kind_of
from factorctl.reporting.statistics import Estimate

MARGIN = 1.5
"""Drift behind a third of the layers tells splits apart to about this factor."""


@dataclass(frozen=True)
class Point:
    """One split. What was not measured, because the split was dropped, is None."""

    name: str
    kind: Kind
    num_experts: int
    top_k: int
    expert_size: int
    shared_size: int
    active_ffn_fraction: float
    drift: float
    """How far its stream is from the dense model's behind a third of the layers: median relative distance."""
    ffn_gflops: float
    """Of one prompt."""
    total_gflops: float
    ffn_flops_reduction: float
    total_flops_reduction: float
    export_target: str
    export_bytes: int
    """Of the weights of `factorctl export --to` the target."""
    engines: dict[str, bool]
    """Whether each stock engine runs that export and computes what it should."""
    dropped: str | None = None
    """Why it was dropped behind a third of the layers."""
    perplexity: float | None = None
    accuracy: float | None = None
    """Share of the next tokens that it holds for the likeliest."""
    accuracy_kept: float | None = None
    """The same over the dense model's."""
    perplexity_kept: float | None = None
    """Dense perplexity over its own."""
    prefill: Estimate | None = None
    """Times as fast as the dense model."""
    decode: Estimate | None = None
    dominated_by: str | None = None
    """A point that is as good and faster, or as fast and better."""

    @property
    def shape(self) -> FactorShape:
        return FactorShape(self.num_experts, self.top_k, self.expert_size, self.shared_size)

    @property
    def measured(self) -> bool:
        return self.perplexity is not None

    def speed_up(self, phase: Phase) -> float:
        found = self.prefill if phase == "prefill" else self.decode
        assert found is not None, "asked for the speed of a dropped split"
        return found.median

    def kept(self, by: Kept) -> float:
        found = self.accuracy_kept if by == "accuracy" else self.perplexity_kept
        assert found is not None, "asked for the quality of a dropped split"
        return found

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Point:
        """What `to_json` gave."""
        speeds = {phase: None if raw[phase] is None else Estimate(**raw[phase]) for phase in ("prefill", "decode")}
        return cls(**{**raw, **speeds})


def marked(points: Sequence[Point], phase: Phase) -> list[Point]:
    """The points, each that loses to another in quality and speed with the name of one that it loses to."""
    measured = [point for point in points if point.measured]

    def beats(one: Point, other: Point) -> bool:
        assert one.perplexity is not None
        assert other.perplexity is not None
        better, faster = one.perplexity <= other.perplexity, one.speed_up(phase) >= other.speed_up(phase)
        differs = one.perplexity < other.perplexity or one.speed_up(phase) > other.speed_up(phase)
        return better and faster and differs

    def winner(point: Point) -> str | None:
        if not point.measured:
            return None
        winners = [other for other in measured if beats(other, point)]
        return min(winners, key=lambda other: other.perplexity or 0.0).name if winners else None

    return [replace(point, dominated_by=winner(point)) for point in points]


def front(points: Sequence[Point], phase: Phase) -> list[Point]:
    """The measured points that lose to none, slowest first."""
    kept = [point for point in points if point.measured and point.dominated_by is None]
    return sorted(kept, key=lambda point: point.speed_up(phase))


def meets(point: Point, config: FrontierConfig) -> bool:
    """Whether a measured point keeps every budget that was set."""
    return (
        (config.speed_up is None or point.speed_up(config.phase) >= config.speed_up)
        and (config.active is None or point.active_ffn_fraction <= config.active + 1e-9)
        and (config.keep is None or point.kept(config.keep_by) >= config.keep)
    )


def best(points: Sequence[Point], config: FrontierConfig) -> Point | None:
    """The point that is meant: the fastest where only quality is bounded, else the one of the least perplexity."""
    fitting = [point for point in points if point.measured and meets(point, config)]
    if not fitting:
        return None
    if config.speed_up is None and config.active is None:
        return max(fitting, key=lambda point: point.speed_up(config.phase))
    return min(fitting, key=lambda point: point.perplexity or 0.0)


def why_hopeless(drift: float, shape: FactorShape, points: Sequence[Point], config: FrontierConfig) -> str | None:
    """Why a split that is so far from the dense model behind a third of its layers is not worth the rest.

    Another one is surely no slower and was `MARGIN` times nearer there; or another one was that much nearer there, and
    misses the quality that is asked for all the same. Fewer active neurons are no slower, unless they are routed where
    these are not.
    """
    for point in (point for point in points if drift > MARGIN * point.drift):
        no_slower = point.kind == "static" or kind_of(shape) == "routed"
        if no_slower and point.active_ffn_fraction <= shape.active_ffn_fraction:
            return f"behind a third of the layers {drift / point.drift:.1f} times as far from dense as {point.name}"
        if config.keep is not None and point.measured and point.kept(config.keep_by) < config.keep:
            return f"behind a third of the layers farther from dense than {point.name}, which keeps too little"
    return None
