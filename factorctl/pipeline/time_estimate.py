"""About how long `factorize` will take here: its bytes and its arithmetic over two rates measured on the spot.

T calibration tokens, D hidden_size, F intermediate_size, N num_experts. A multiply-accumulate is 2 FLOPs. The result
is good to a factor of about two: it is there to tell minutes from hours.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

import torch

from factorctl.calibration.closed_form import REFIT_DAMPINGS
from factorctl.config import FactorizeConfig, FactorShape

PROBE_SECONDS = 0.15
PASSES_OVER_BYTES = 4
"""The source is hashed and read, the result hashed and written; each is taken to be as fast as hashing."""
CLUSTER_ROUNDS = 25
SAMPLING_SHARE = 0.25
"""Part of the GEMM rate that drawing token by token reaches."""
FLOAT64_COST = 2


def factorize_seconds(
    config: FactorizeConfig,
    shape: FactorShape,
    *,
    hidden_size: int,
    num_layers: int,
    parameters: int,
    source_bytes: int,
    calibrates: bool,
    compressed: bool,
    device: torch.device,
) -> float:
    """Expected wall seconds of a run that finds no finished layer and no cached calibration text."""
    seconds = PASSES_OVER_BYTES * source_bytes / hashing_rate()
    flops = num_layers * _layer_flops(config, shape, hidden_size, compressed=compressed) if calibrates else 0.0
    if calibrates:
        flops += 2 * parameters * config.calibration_tokens
        if config.calibration == "self":
            flops += 2 * parameters * config.calibration_tokens / SAMPLING_SHARE
    if config.strategy == "clustered":
        flops += num_layers * CLUSTER_ROUNDS * 4 * shape.intermediate_size * shape.num_experts * hidden_size
    return seconds + flops / gemm_rate(device)


def _layer_flops(config: FactorizeConfig, shape: FactorShape, hidden_size: int, *, compressed: bool) -> float:
    """Arithmetic of calibrating one layer, beyond the dense model's own forward pass."""
    tokens, inner = config.calibration_tokens, shape.intermediate_size
    ffn_pass = 6 * hidden_size * inner * tokens
    flops = float(ffn_pass)  # statistics
    if compressed:
        flops += ffn_pass * shape.active_ffn_fraction  # onward through the factored layer
    if config.router == "analytic":
        flops += ffn_pass + 2 * hidden_size**2 * tokens
    if config.refit:
        solve = inner**3 / 3 + 4 * inner**2 * hidden_size
        flops += ffn_pass + 2 * inner**2 * tokens + len(REFIT_DAMPINGS) * (FLOAT64_COST * solve + ffn_pass / 8)
    return flops


def gemm_rate(device: torch.device) -> float:
    """FLOPs per second of a float32 matrix product of middling size."""
    left, right = torch.ones(512, 1024, device=device), torch.ones(1024, 1024, device=device)

    def multiply() -> None:
        product = left @ right
        float(product[0, 0])  # waits for the GPU

    return 2 * 512 * 1024 * 1024 / _seconds_of(multiply)


def hashing_rate() -> float:
    """Bytes per second of sha256."""
    block = bytes(4 << 20)
    return len(block) / _seconds_of(lambda: hashlib.sha256(block).digest())


def _seconds_of(work: Callable[[], object]) -> float:
    """Mean seconds of a call, over `PROBE_SECONDS`, after one that warms up."""
    work()
    started, calls = time.perf_counter(), 0
    while time.perf_counter() - started < PROBE_SECONDS:
        work()
        calls += 1
    return (time.perf_counter() - started) / calls
