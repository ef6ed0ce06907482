"""What a search found: the points, the promise, and how both are told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from factorctl.pipeline.frontier.points import Point
from factorctl.reporting.hardware import Hardware
from factorctl.reporting.statistics import Estimate


@dataclass(frozen=True)
class Promise:
    """The chosen point, its speed measured once more."""

    point: str
    prefill: Estimate
    decode: Estimate
    perplexity: float
    accuracy_kept: float
    recipe: str


@dataclass(frozen=True)
class FrontierResult:
    """Every split that was tried; the keys of `--format json`."""

    source: str
    dense_perplexity: float
    dense_accuracy: float
    heldout_text: str
    heldout_tokens: int
    points: list[Point]
    """Fewest active neurons first."""
    front: list[str]
    """Names of the points that lose to none, slowest first."""
    chosen: Promise | None
    """None where no budget was set."""
    untried: list[str]
    """Splits that there was no time for."""
    reused: int
    """Points that an earlier run had measured."""
    hardware: Hardware
    versions: dict[str, str]
    config: dict[str, Any]
    remarks: list[str]
    seconds: float
    peak_rss_bytes: int
    written: list[str]


def promise_of(point: Point, recipe: Path) -> Promise:
    """What is promised of a point that was confirmed."""
    assert point.prefill is not None
    assert point.decode is not None
    assert point.perplexity is not None
    return Promise(point.name, point.prefill, point.decode, point.perplexity, point.kept("accuracy"), str(recipe))


def promise_lines(result: FrontierResult, promise: Promise) -> list[str]:
    """What was promised, for people."""
    tokens, batch = result.config["prompt"], result.config["batch"]
    return [
        f"{promise.point} of {result.source}: decodes at {promise.decode.median:.2f}x of dense "
        f"[{promise.decode.low:.2f}, {promise.decode.high:.2f}], prefills at {promise.prefill.median:.2f}x "
        f"[{promise.prefill.low:.2f}, {promise.prefill.high:.2f}]",
        f"(batch {batch}, prompt {tokens}, {result.hardware.device}, {result.hardware.threads} threads, "
        f"{result.hardware.dtype});",
        f"perplexity {promise.perplexity:.2f} where dense has {result.dense_perplexity:.2f}, next-token accuracy kept "
        f"{promise.accuracy_kept:.1%}, before any training.",
    ]
