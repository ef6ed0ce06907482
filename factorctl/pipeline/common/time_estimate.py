"""About how long `factorize` will take here: what it does, counted, over rates that are measured on the spot.

T calibration tokens, D hidden_size, F intermediate_size, N num_experts, L decoder layers. A multiply-accumulate is 2
FLOPs. The result is good to a factor of about two: it is there to tell minutes from hours.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from factorctl.calibration.closed_form import SCALE_TOKENS, SHARPNESS_TOKENS
from factorctl.calibration.stream import BATCH_TOKENS
from factorctl.config.factorize import FactorizeConfig
from factorctl.config.shape import FactorShape
from factorctl.contracts import SAMPLE_TOKENS

PROBE_SECONDS = 0.1
PASSES_OVER_BYTES = 4
"""The source is hashed and read, the result hashed and written; each is taken to be as fast as hashing."""
CLUSTER_ROUNDS, ROUTED_ROUNDS = 25, 8
CALLS_PER_LAYER = 220
"""What a decoder layer costs beside its arithmetic, in calls of the smallest operation: 200 to 245 measured for Llama,
Qwen3 and Gemma 2 on a CPU. It is all that a small model's token-by-token sampling takes."""
EARLY_ENDS = 1.5
"""Documents of `self` that end before their full length leave room in a batch: so many times the steps."""
FLOPS_PER_ELEMENT = 16
"""One pass over the elements of a tensor takes as long as so many FLOPs of a matrix product."""
FLOAT64_COST = 2


@dataclass(frozen=True)
class DenseSize:
    """What of the dense model decides the time."""

    hidden_size: int
    num_layers: int
    vocabulary: int
    parameters: int
    source_bytes: int


@dataclass(frozen=True)
class Sampling:
    """How `self` draws its text: documents of a length, so many at once."""

    document_length: int
    batch_size: int

    def steps(self, tokens: int) -> int:
        """Forward passes of one token per document until `tokens` are drawn, documents running to their full length."""
        return math.ceil(tokens / (self.document_length * self.batch_size)) * (self.document_length - 1)


@dataclass(frozen=True)
class Rates:
    """What this machine does in a second."""

    flops: float
    """In float32 products of many rows."""
    thin_flops: float
    """In float32 products of as many rows as documents are drawn at once, of weights that no cache holds."""
    calls: float
    """Of a small operation from Python."""
    drawn_rows: float
    """Tokens drawn from logits over the whole vocabulary."""
    hashed_bytes: float


def measured_rates(device: torch.device, sampling: Sampling, vocabulary: int) -> Rates:
    """Takes about half a second."""
    return Rates(
        flops=gemm_rate(device),
        thin_flops=gemm_rate(device, rows=sampling.batch_size, width=4096),
        calls=1 / _seconds_of(_small_call(device)),
        drawn_rows=sampling.batch_size / _seconds_of(_draw(device, sampling.batch_size, vocabulary)),
        hashed_bytes=hashing_rate(),
    )


def factorize_seconds(
    config: FactorizeConfig,
    shape: FactorShape,
    dense: DenseSize,
    sampling: Sampling | None,
    rates: Rates,
    *,
    calibrates: bool,
    compressed: bool,
) -> dict[str, float]:
    """Expected seconds of each part of a run that finds no finished layer and no cached calibration text.

    Args:
        sampling: None where the text is not sampled from the model.
    """
    tokens, layers, width = config.calibrated_on, dense.num_layers, dense.hidden_size
    seconds = {"reading and writing": PASSES_OVER_BYTES * dense.source_bytes / rates.hashed_bytes}
    if calibrates and sampling is not None:
        drawn = tokens + sampling.document_length
        calls = EARLY_ENDS * sampling.steps(drawn) * layers * CALLS_PER_LAYER
        arithmetic = 2 * dense.parameters * drawn / rates.thin_flops
        seconds["sampling text"] = calls / rates.calls + arithmetic + drawn / rates.drawn_rows
    if calibrates:
        calls = math.ceil(tokens / BATCH_TOKENS) * layers * CALLS_PER_LAYER
        seconds["running the model"] = calls / rates.calls + 2 * dense.parameters * tokens / rates.flops
        fitting = _fitting_flops(config, shape, width, compressed=compressed)
        seconds["fitting"] = layers * fitting / rates.flops
    seconds["partitioning"] = layers * _partition_flops(config, shape, width) / rates.flops
    return seconds


def _partition_flops(config: FactorizeConfig, shape: FactorShape, width: int) -> float:
    """Of one layer: rounds of k-means over its neurons, and for `routed` rounds of routers over its tokens."""
    inner, experts = shape.intermediate_size, shape.num_experts
    clustering = float(CLUSTER_ROUNDS * 4 * inner * experts * width)
    if config.strategy == "clustered":
        return clustering
    if config.strategy != "routed":
        return 0.0
    tokens = min(config.calibrated_on, SAMPLE_TOKENS)
    masses = 8 * FLOPS_PER_ELEMENT * tokens * inner
    router = 2 * tokens * width**2 + FLOAT64_COST * width**3 / 3
    a_round = 6 * tokens * inner * experts + 4 * tokens * width * experts
    return clustering + masses + router + ROUTED_ROUNDS * a_round


def _fitting_flops(config: FactorizeConfig, shape: FactorShape, width: int, *, compressed: bool) -> float:
    """Of the closed-form steps of one layer and of the way on through what they gave, activations at hand."""
    tokens, inner = config.calibrated_on, shape.intermediate_size
    down = 2 * width * inner * tokens + 3 * FLOPS_PER_ELEMENT * tokens * inner
    turns = 1.5 if config.router == "analytic" and shape.routes else 1.0  # the first one is on half of the tokens
    flops = 0.0
    if compressed:
        flops += (1 + 1 / 8) * down  # onward, and the held-out tokens' error
    if config.router == "analytic":
        benefits = 2 * down
        sharpness = 2 * down * min(1.0, SHARPNESS_TOKENS / tokens)
        flops += turns * (benefits + 2 * width**2 * tokens + FLOAT64_COST * width**3 / 3 + sharpness)
    if config.split.scale == "fitted":
        flops += turns * down * min(1.0, SCALE_TOKENS / tokens)
    if config.refit:
        solve, solved = inner**3 / 3 + 4 * inner**2 * width, 2 * turns + 1
        flops += turns * (down + 2 * inner**2 * tokens) + solved * (FLOAT64_COST * solve + down / 8)
    return flops


def gemm_rate(device: torch.device, *, rows: int = 512, width: int = 1024) -> float:
    """FLOPs per second of a float32 matrix product, [rows, width] times [width, width]."""
    left, right = torch.ones(rows, width, device=device), torch.ones(width, width, device=device)

    def multiply() -> None:
        product = left @ right
        float(product[0, 0])  # waits for the GPU

    return 2 * rows * width * width / _seconds_of(multiply)


def hashing_rate() -> float:
    """Bytes per second of sha256."""
    block = bytes(4 << 20)
    return len(block) / _seconds_of(lambda: hashlib.sha256(block).digest())


def _small_call(device: torch.device) -> Callable[[], object]:
    left = torch.ones(32, 64, device=device)
    return lambda: left * left


def _draw(device: torch.device, rows: int, vocabulary: int) -> Callable[[], object]:
    """What a draw does to logits: softmax, and its running sum in float64."""
    logits_RV = torch.zeros(rows, vocabulary, device=device)
    return lambda: float(torch.softmax(logits_RV, dim=-1).cumsum(dim=-1, dtype=torch.float64)[0, -1])


def _seconds_of(work: Callable[[], object]) -> float:
    """Mean seconds of a call, over `PROBE_SECONDS`, after one that warms up."""
    work()
    started, calls = time.perf_counter(), 0
    while time.perf_counter() - started < PROBE_SECONDS:
        work()
        calls += 1
    return (time.perf_counter() - started) / calls
