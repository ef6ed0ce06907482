"""The speed-up that this machine's arithmetic and memory bandwidth allow, from rates measured in the same run.

Each part of a forward pass takes at least max(FLOPs / rate, bytes / bandwidth). Routing, launches and cache misses are
not in it: the quotient of two such sums is a ceiling, not a forecast.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from factorctl.ffn.few_token_linear import linear
from factorctl.ffn.kernel import cpu as cpu_kernel
from factorctl.profiling.flops import count_flops
from factorctl.profiling.runtime import synchronised_clock
from factorctl.profiling.sizes import ModelSizes

STREAM_BYTES = 256 << 20
"""More than any CPU's or GPU's cache."""
GEMM_TOKENS = 512
GEMM_TOKENS_GPU = 8192
REPEATS = 5


@dataclass(frozen=True)
class Machine:
    """What the device reached with matrices of the model's own sizes."""

    gemm_flops: float
    """FLOP/s of a product with many tokens, torch's or the compiled kernel's."""
    bandwidth: float
    """Bytes/s of weights read in products with one token."""


@torch.no_grad()
def measure_machine(sizes: ModelSizes, dtype: torch.dtype, device: torch.device) -> Machine:
    """Best of five of each; the weights stream from memory, not from a cache."""
    rows, width = 2 * sizes.shape.intermediate_size, sizes.hidden_size
    copies = max(2, STREAM_BYTES // (rows * width * dtype.itemsize))
    weights = torch.randn(copies, rows, width, device=device).to(dtype)
    tokens = GEMM_TOKENS_GPU if device.type == "cuda" else GEMM_TOKENS
    many, one = torch.randn(tokens, width, device=device).to(dtype), torch.randn(1, width, device=device).to(dtype)

    def read_all() -> None:
        for weight in weights:
            linear(one, weight)

    gemm_seconds = _best(lambda: F.linear(many, weights[0]), device)
    if cpu_kernel.can_run(many, weights[0]):
        gemm_seconds = min(gemm_seconds, _best(lambda: cpu_kernel.linear(many, weights[0]), device))
    return Machine(
        gemm_flops=2 * tokens * rows * width / gemm_seconds,
        bandwidth=weights.numel() * dtype.itemsize / _best(read_all, device),
    )


def _best(run: Callable[[], object], device: torch.device) -> float:
    clock = synchronised_clock(device)
    times = []
    for _ in range(REPEATS + 1):
        start = clock()
        run()
        times.append(clock() - start)
    return min(times[1:])


def least_seconds(
    sizes: ModelSizes,
    machine: Machine,
    *,
    tokens: int,
    context: int,
    batch: int,
    experts_hit: float,
    itemsize: int,
) -> float:
    """The least time of a forward pass over `tokens` new tokens per sequence after `context` cached ones.

    Args:
        experts_hit: experts per layer that some token of the batch chooses; their weights are read once.
    """
    flops = count_flops(sizes, tokens, context=context, batch=batch)
    neurons = sizes.shape.shared_size + experts_hit * sizes.shape.expert_size
    kv_values = 2 * sizes.num_kv_heads * sizes.head_dim * (context + tokens) * batch
    parts = (
        (flops.ffn, sizes.num_layers * neurons * sizes.neuron_weights),
        (flops.router, sizes.num_layers * sizes.router_weights),
        (flops.attention_projections, sizes.num_layers * sizes.attention_weights),
        (flops.attention_core, sizes.num_layers * kv_values),
        (flops.head, sizes.head_weights),
    )
    return sum(max(work / machine.gemm_flops, values * itemsize / machine.bandwidth) for work, values in parts)


def ceiling(
    sizes: ModelSizes, machine: Machine, *, tokens: int, context: int, batch: int, experts_hit: float, itemsize: int
) -> float:
    """Least time of the dense model over that of the factored one."""

    def least(which: ModelSizes, hit: float) -> float:
        return least_seconds(
            which, machine, tokens=tokens, context=context, batch=batch, experts_hit=hit, itemsize=itemsize
        )

    return least(sizes.dense, sizes.shape.num_experts) / least(sizes, experts_hit)
