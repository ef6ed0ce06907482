"""Everything that a profile found, as plain dataclasses: what `--format json` prints and the plots and page show."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from factorctl.ffn.paths import PathName, Step
from factorctl.profiling.attribution import FfnCost
from factorctl.profiling.expert_load import LayerLoad
from factorctl.profiling.flops import SweepRow
from factorctl.reporting.hardware import Hardware
from factorctl.reporting.statistics import Estimate, Spread

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True)
class LatencyRow:
    """One phase in one regime: the model against the dense model in the same runtime, and the other anchors.

    `prefill` is the time to the first token (TTFT), `decode` the time per further token (TPOT); milliseconds.
    """

    phase: Phase
    batch: int
    tokens: int
    """Prompt tokens per sequence; decoding begins after them."""
    path: PathName
    dense_ms: float
    model_ms: float
    narrow_ms: float
    """A dense model as wide as the active neurons."""
    stock_ms: float
    """transformers' own dense model."""
    speedup: Estimate
    """dense / model."""
    ceiling: float
    """What the roofline allows."""
    floor_share: Estimate
    """narrow / model: 1 when routing costs nothing."""
    spread: dict[str, Spread]
    """Percentiles by variant."""
    tokens_per_second: float
    """Of the model, over the whole batch."""
    peak_bytes: int | None
    samples_ms: dict[str, list[float]] = field(repr=False)

    @property
    def loses(self) -> bool:
        """Whether the model is slower than the dense one."""
        return self.speedup.median < 1


@dataclass(frozen=True)
class FlopsReport:
    """FLOPs of one prompt, head at its last position, causal attention; 1 multiply-accumulate = 2 FLOPs."""

    tokens: int
    dense: dict[str, float]
    model: dict[str, float]
    """Active: what the chosen experts need."""
    executed: dict[str, float]
    """What the path chosen for a prompt this long multiplies."""
    counter_difference: float
    """Largest relative difference to torch's FlopCounterMode."""
    note: str = "1 multiply-accumulate = 2 FLOPs; causal attention core; head at the last position only"


@dataclass(frozen=True)
class MachineReport:
    """Rates that the ceilings follow from, measured in the same run."""

    gemm_gflops: float
    bandwidth_gb_s: float


@dataclass(frozen=True)
class TuningReport:
    """Times of the paths on this machine, and the steps that were cached."""

    site: str
    cache_file: str
    timings_ms: dict[int, dict[PathName, float]]
    steps: tuple[Step, ...]
    before: tuple[Step, ...]


@dataclass(frozen=True)
class ProfileResult:
    """The report of `factorctl profile`."""

    checkpoint: str
    manifest_sha256: str | None
    notation: str
    text: str
    """What the routing was decided by."""
    flops: FlopsReport
    ffn_flops_reduction: float
    total_flops_reduction: float
    sweep: list[SweepRow]
    latency: list[LatencyRow]
    ffn_costs: list[FfnCost]
    expert_load: list[LayerLoad]
    machine: MachineReport
    weight_bytes: int
    """In memory and on disk; factoring changes neither."""
    peak_rss_bytes: int
    hardware: Hardware
    busy: bool
    versions: dict[str, str]
    config: dict[str, object]
    remarks: list[str]
    tuning: TuningReport | None = None
    written: list[str] = field(default_factory=list)
    """Plots and page."""
