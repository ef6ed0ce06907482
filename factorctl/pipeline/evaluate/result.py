"""Everything that an evaluation found, as plain dataclasses: what `--format json` prints and the reports show."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from factorctl.evaluation.fidelity import LayerFidelity
from factorctl.evaluation.perplexity import PerplexityComparison
from factorctl.reporting.hardware import Hardware

RESULTS_NAME = "results.json"
"""The report on disk."""


@dataclass(frozen=True)
class PromptFlops:
    """Billions of floating-point operations over all layers for a prompt, as `profile` counts them."""

    tokens: int
    attention: float
    """Projections and core."""
    ffn: float
    """Of the active neurons, the router included."""


@dataclass(frozen=True)
class MethodRow:
    """One way to run the model, beside the others."""

    title: str
    active_ffn_fraction: float | None
    """Share of the FFN neurons that work for a token, on average; None where nobody says (a plain directory)."""
    perplexity: dict[str, float]
    """By text."""
    domains: dict[str, dict[str, float]]
    """By text and domain: perplexity; empty where the text names no domains."""
    tasks: dict[str, float]
    """By task: its primary metric."""
    task_average: float | None
    kept: float | None
    """Share of the dense model's score that is kept, mean over tasks: the paper's relative maintenance."""
    kept_above_chance: float | None
    """The same for what the scores are above chance."""
    gflops: PromptFlops | None = None
    """Of a prompt of one window; None where the sizes or the active share are not known."""
    reference: str | None = None
    """Paper of the method."""


@dataclass(frozen=True)
class EvalResult:
    """The report of `factorctl eval`."""

    checkpoint: str
    source: str
    """What it was compared with."""
    notation: str | None
    active_ffn_fraction: float | None
    routing: str | None
    """`token` or `domain`; None where no experts are chosen or nobody says."""
    manifest_sha256: str | None
    perplexity: dict[str, PerplexityComparison]
    domains: dict[str, dict[str, PerplexityComparison]]
    """By text and domain, where the rows of a text name theirs."""
    tasks: dict[str, dict[str, Any]]
    """By task: metric, n, model, dense, stderr_diff, p_value, wins, losses, chance, kept, kept_above_chance,
    few_shot."""
    average: dict[str, float | None]
    """kept and kept_above_chance over all tasks."""
    dense: MethodRow
    model: MethodRow
    controls: dict[str, MethodRow]
    fidelity: list[LayerFidelity]
    hardware: Hardware
    versions: dict[str, str]
    seed: int
    command: str | None
    config: dict[str, Any]
    remarks: list[str]
    seconds: float
    peak_rss_bytes: int
    parts: dict[str, int]
    """How many measurements were computed in this run, and how many were taken from an earlier one."""
    written: list[str] = field(default_factory=list)

    def methods(self) -> Iterator[MethodRow]:
        """The rows of the table: dense, the model, the controls."""
        yield self.dense
        yield self.model
        yield from self.controls.values()
