"""FFN-layer speed: the factored layer against dense anchors of the same runtime, per shape, dtype and token count.

    python tests/benchmarks/bench_ffn.py --seconds 2 --out docs/benchmarks/<date>-ffn-<machine>.md

Anchors: `dense` is the same module with all experts on (gate and up in one GEMM, down in rows), `stock` transformers'
three linear layers, `narrow` a dense layer as wide as the active neurons: the floor. Several tokens choose more experts
than one does, and their weights have to be read too; so what routing can reach is the floor, or the time in which a
dense layer as wide as the experts that T tokens choose serves one token, whichever is longer: between `narrow` and
`dense` at one token, by its width. Layers take turns over more
weights than the cache holds and tokens change from call to call; calls are interleaved in random order and medians
compared. Needs a quiet machine.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path

import torch
from torch import nn

from factorctl.config.shape import FactorShape
from factorctl.ffn.layer import FactoredFFN
from factorctl.profiling.variants import StockFFN, dense_as_wide_as, with_all_experts
from factorctl.reporting.hardware import look_at_hardware
from factorctl.reporting.statistics import Estimate, ratio_of_medians

SIZES = {"SmolLM2-135M": (576, 1536), "TinyLlama-1.1B": (2048, 5632)}
SPLITS = ((4, 1), (4, 2), (8, 2), (64, 8))
TOKENS = (1, 2, 4, 8, 16, 64, 256, 512)
STREAM_BYTES = 256 << 20
MIN_CALLS = 15


@dataclass(frozen=True)
class Row:
    """Medians in microseconds, and ratios with 95% bootstrap intervals."""

    model: str
    dtype: str
    notation: str
    tokens: int
    path: str
    dense_us: float
    layer_us: float
    speedup: Estimate
    stock_speedup: float
    """stock / layer: against what users run today."""
    floor_share: float
    reach_share: float


def layers_of(size: tuple[int, int], split: tuple[int, int], dtype: torch.dtype) -> list[FactoredFFN]:
    """Enough layers to stream from memory."""
    (width, inner), (n, k) = size, split
    count = max(2, STREAM_BYTES // (3 * width * inner * dtype.itemsize))
    layers = []
    for _ in range(count):
        ffn = FactoredFFN(FactorShape(n, k, inner // n, 0), width, "silu", dtype=dtype).requires_grad_(False)
        for parameter in ffn.parameters():
            nn.init.normal_(parameter, std=0.02)
        ffn.keep_experts_together()
        layers.append(ffn)
    return layers


def inputs_of(tokens: int, model: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """[T, D] each, other ones from call to call."""
    return cycle([torch.randn(tokens, SIZES[model][0]).to(dtype) for _ in range(5)])


def timed(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Microseconds of each call, interleaved in random order, until the time is up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    names = list(calls)
    for name in names:
        calls[name]()
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds or len(times[names[0]]) < MIN_CALLS:
        order.shuffle(names)
        for name in names:
            start = time.perf_counter()
            calls[name]()
            times[name].append((time.perf_counter() - start) * 1e6)
    return times


@torch.no_grad()
def measure(model: str, split: tuple[int, int], dtype: torch.dtype, counts: list[int], seconds: float) -> Iterator[Row]:
    """One row per token count."""
    factored = layers_of(SIZES[model], split, dtype)
    stock = [StockFFN(ffn) for ffn in factored]
    rings: dict[str, Iterator[nn.Module]] = {
        "layer": cycle(factored),
        "dense": cycle(
            [with_all_experts(ffn, plain.dense.down_DF) for ffn, plain in zip(factored, stock, strict=True)]
        ),
        "stock": cycle(stock),
        "narrow": cycle([dense_as_wide_as(ffn, split[1]) for ffn in factored]),
    }
    for turn, ring in enumerate(rings.values()):
        for _ in range(turn * len(factored) // len(rings)):
            next(ring)  # rings that share weights stand at different layers: none warms the cache for another
    for tokens in counts:
        inputs = inputs_of(tokens, model, dtype)

        def call(ring: Iterator[nn.Module], inputs: Iterator[torch.Tensor] = inputs) -> None:
            next(ring)(next(inputs))

        one_token = inputs_of(1, model, dtype)
        calls = {name: partial(call, ring) for name, ring in rings.items()}
        calls |= {f"{name} at one": partial(call, rings[name], one_token) for name in ("dense", "narrow")}
        times = timed(calls, seconds)
        medians = {name: statistics.median(found) for name, found in times.items()}
        active = split[1] / split[0]
        chosen_besides = (1 - active - (1 - active) ** tokens) / (1 - active)  # of what a first token leaves out
        narrow, dense = medians["narrow at one"], medians["dense at one"]
        reading = narrow + chosen_besides * (dense - narrow)
        yield Row(
            model=model,
            dtype=str(dtype).removeprefix("torch."),
            notation=factored[0].shape.notation,
            tokens=tokens,
            path=factored[0].path_for(tokens),
            dense_us=medians["dense"],
            layer_us=medians["layer"],
            speedup=ratio_of_medians(times["dense"], times["layer"], seed=0),
            stock_speedup=medians["stock"] / medians["layer"],
            floor_share=medians["narrow"] / medians["layer"],
            reach_share=max(medians["narrow"], reading) / medians["layer"],
        )


def as_markdown(row: Row) -> str:
    speedup = f"{row.speedup.median:.2f} [{row.speedup.low:.2f}, {row.speedup.high:.2f}]"
    cells = (row.model, row.dtype, row.notation, row.tokens, row.path, f"{row.dense_us:.0f}", f"{row.layer_us:.0f}",
             speedup, f"{row.stock_speedup:.2f}", f"{row.floor_share:.0%}", f"{row.reach_share:.0%}")  # fmt: skip
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="per row")
    parser.add_argument("--models", default=",".join(SIZES))
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--tokens", default=",".join(str(tokens) for tokens in TOKENS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    hardware = look_at_hardware(torch.device("cpu"), torch.float32)
    lines = [
        f"FFN layer on {hardware.processor}, {hardware.threads} threads of {hardware.cores} cores, "
        f"load {hardware.load_1min:g} at the start{' (BUSY)' if hardware.busy else ''}, torch {torch.__version__}.",
        "",
        "| model | dtype | split | tokens | path | dense us | layer us | speed-up | against stock | floor | reach |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    counts = [int(tokens) for tokens in arguments.tokens.split(",")]
    for model in arguments.models.split(","):
        for dtype in arguments.dtypes.split(","):
            for split in SPLITS:
                for row in measure(model, split, getattr(torch, dtype), counts, arguments.seconds):
                    lines.append(as_markdown(row))
                    print(lines[-1], flush=True)
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
