"""Floating-point operations, counted from sizes. One multiply-accumulate is 2 FLOPs (fvcore counts it as 1).

Counted are matrix products: the FFN's three, the router, the four attention projections, the attention core (q k^T and
its product with v) and the head. Norms, activations, rotary embeddings and softmax are not; they are under 1%.

    active:   what the chosen experts need, 2 * 3 * D * (S + K*H) per token and layer.
    executed: what the path that runs really multiplies. `masked` runs every expert: the dense FLOPs.

T tokens, D hidden_size, N num_experts, H expert_size, S shared_size, K top_k.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from factorctl.ffn.paths import PathName
from factorctl.profiling.sizes import ModelSizes

Core = Literal["causal", "full"]


@dataclass(frozen=True)
class Flops:
    """FLOPs of one forward pass, by part."""

    ffn: float
    """Routed experts and shared neurons."""
    shared_ffn: float
    """The shared neurons' part of `ffn`."""
    router: float
    attention_projections: float
    attention_core: float
    head: float

    @property
    def attention(self) -> float:
        return self.attention_projections + self.attention_core

    @property
    def total(self) -> float:
        return self.ffn + self.router + self.attention + self.head

    def to_json(self) -> dict[str, float]:
        return {**asdict(self), "attention": self.attention, "total": self.total}


def count_flops(
    sizes: ModelSizes,
    tokens: int,
    *,
    context: int = 0,
    batch: int = 1,
    head_positions: int = 1,
    core: Core = "causal",
    experts_run: float | None = None,
) -> Flops:
    """FLOPs of a forward pass over `tokens` new tokens per sequence, after `context` cached ones.

    Args:
        head_positions: positions per sequence that the head computes: 1 in generation, all of them in training.
        core: `causal` counts the (query, key) pairs that attend; `full` all, as a kernel without causality runs.
        experts_run: routed experts multiplied per token; K by default (active), N for `masked`.
    """
    shape, layers, total_tokens = sizes.shape, sizes.num_layers, batch * tokens
    experts = shape.top_k if experts_run is None else experts_run
    per_neuron = 2 * sizes.neuron_weights * layers * total_tokens
    shared = float(per_neuron * shape.shared_size)
    pairs = batch * attended_pairs(tokens, context, core)
    return Flops(
        ffn=shared + per_neuron * experts * shape.expert_size,
        shared_ffn=shared,
        router=float(2 * sizes.router_weights * layers * total_tokens),
        attention_projections=float(2 * sizes.attention_weights * layers * total_tokens),
        attention_core=4.0 * sizes.num_heads * sizes.head_dim * layers * pairs,
        head=float(2 * sizes.head_weights * batch * head_positions),
    )


def attended_pairs(tokens: int, context: int, core: Core) -> int:
    """(query, key) pairs of one sequence: causal query i sees the context and the i + 1 first new tokens."""
    if core == "full":
        return tokens * (context + tokens)
    return tokens * context + tokens * (tokens + 1) // 2


def experts_run_by(path: PathName, sizes: ModelSizes) -> int:
    """Routed experts that `path` multiplies per token."""
    return sizes.shape.num_experts if path in ("masked", "dense") else sizes.shape.top_k


def reduction(dense: float, model: float) -> float:
    """The share that was saved: 0.75 when a quarter is left."""
    return 1 - model / dense


@dataclass(frozen=True)
class SweepRow:
    """One row of the paper's table: GFLOPs of one prompt at one number of active experts."""

    notation: str
    top_k: int
    ffn_gflops: float
    total_gflops: float
    ffn_reduction: float
    total_reduction: float


def sweep_top_k(sizes: ModelSizes, tokens: int) -> list[SweepRow]:
    """From the fewest active experts to the dense model, over a prompt of `tokens`."""
    dense = count_flops(sizes.dense, tokens)
    first = 0 if sizes.shape.shared_size else 1
    rows = []
    for top_k in range(first, sizes.shape.num_experts + 1):
        model = sizes.with_top_k(top_k)
        flops = count_flops(model, tokens)
        rows.append(
            SweepRow(
                notation="dense" if model.is_dense else model.shape.notation,
                top_k=top_k,
                ffn_gflops=flops.ffn / 1e9,
                total_gflops=flops.total / 1e9,
                ffn_reduction=reduction(dense.ffn, flops.ffn),
                total_reduction=reduction(dense.total, flops.total),
            )
        )
    return rows
