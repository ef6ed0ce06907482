"""Time to the first token and time per further token, of all variants in turn.

Rounds are interleaved (A B C D, then D C B A, ...), so that whatever slows the machine down meets all variants; ratios
pair the samples of one round. Every variant sees the same tokens: a prompt of real text, then its true continuation.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from factorctl.memory import peak_memory
from factorctl.profiling.runtime import Clock, Runtime, make_runtime, synchronised_clock
from factorctl.profiling.variants import VariantName

MIN_ROUNDS = 3


@dataclass(frozen=True)
class Regime:
    """How many sequences, and how many tokens each has before decoding begins."""

    batch: int
    prompt: int


@dataclass(frozen=True)
class Effort:
    """How much is measured per regime."""

    rounds: int
    decode_tokens: int
    """Decoding steps after each prefill."""
    seconds: float
    """Begin no further round after this long, once there are three."""
    warmup_rounds: int = 1


@dataclass
class Samples:
    """Milliseconds of one variant in one regime; entry i of every variant is from the same round and step."""

    prefill_ms: list[float] = field(default_factory=list)
    decode_ms: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    """Most CUDA memory in use during a round; None on a CPU, where variants share one resident set."""


def measure_regime(
    variants: Mapping[VariantName, PreTrainedModel], ids_BL: torch.Tensor, regime: Regime, effort: Effort
) -> dict[VariantName, Samples]:
    """Samples of every variant.

    Args:
        ids_BL: [batch, at least prompt + decode_tokens] token ids.
    """
    device = ids_BL.device
    runtimes = {
        name: make_runtime(model, device, regime.prompt + effort.decode_tokens) for name, model in variants.items()
    }
    samples = {name: Samples() for name in variants}
    clock = synchronised_clock(device)
    torch._dynamo.reset()  # shapes are new in each regime, and graphs of the last one count against the limit
    for _ in range(effort.warmup_rounds):
        for runtime in runtimes.values():
            run_round(runtime, ids_BL, regime, effort.decode_tokens, clock)
    started = time.perf_counter()
    for done in range(effort.rounds):
        if done >= MIN_ROUNDS and time.perf_counter() - started > effort.seconds:
            break
        for name in _in_turn(list(variants), done):
            _measure_round(samples[name], runtimes[name], ids_BL, regime, effort.decode_tokens, clock)
    return samples


def _in_turn(names: Sequence[VariantName], done: int) -> Sequence[VariantName]:
    return names if done % 2 == 0 else names[::-1]


def _measure_round(
    samples: Samples, runtime: Runtime, ids_BL: torch.Tensor, regime: Regime, decode_tokens: int, clock: Clock
) -> None:
    on_gpu = ids_BL.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(ids_BL.device)
    prefill, decode = run_round(runtime, ids_BL, regime, decode_tokens, clock)
    samples.prefill_ms.append(prefill)
    samples.decode_ms.extend(decode)
    if on_gpu:
        samples.peak_bytes = max(samples.peak_bytes or 0, peak_memory(ids_BL.device))


@torch.no_grad()
def run_round(
    runtime: Runtime, ids_BL: torch.Tensor, regime: Regime, decode_tokens: int, clock: Clock
) -> tuple[float, list[float]]:
    """One prefill and its decoding steps: (TTFT in ms, each step in ms)."""
    start = clock()
    runtime.prefill(ids_BL[:, : regime.prompt]).argmax(-1)
    now = clock()
    prefill_ms, decode_ms = (now - start) * 1e3, []
    for position in range(regime.prompt, regime.prompt + decode_tokens):
        start = clock()
        runtime.decode(ids_BL[:, position : position + 1]).argmax(-1)
        decode_ms.append((clock() - start) * 1e3)
    return prefill_ms, decode_ms


def text_batch(tokens: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """[batch, length] ids cut from a stream of tokens [n], each row from another place; short streams repeat."""
    stride = max(1, len(tokens) // batch)
    index = torch.arange(length)[None, :] + stride * torch.arange(batch)[:, None]
    return tokens[index % len(tokens)]
