"""The sizes of a factored FFN, and how a dense one is cut into them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from factorctl.errors import UsageError

Gate = Literal["softmax", "hard"]
ScaleRule = Literal["sum", "paper", "fitted"]
MIN_EXPERTS, MAX_EXPERTS = 2, 128


@dataclass(frozen=True)
class FactorShape:
    """The sizes of a factored FFN: S + N*H = F."""

    num_experts: int
    top_k: int
    expert_size: int
    shared_size: int

    @property
    def intermediate_size(self) -> int:
        return self.shared_size + self.num_experts * self.expert_size

    @property
    def routes(self) -> bool:
        """Whether there is a choice between experts: 0 < K < N."""
        return 0 < self.top_k < self.num_experts

    @property
    def active_neurons(self) -> int:
        return self.shared_size + self.top_k * self.expert_size

    @property
    def active_ffn_fraction(self) -> float:
        return self.active_neurons / self.intermediate_size

    @property
    def notation(self) -> str:
        """rKeN notation of FactorLLM, e.g. '1R4E2K'; shared neurons are appended as '+S384'."""
        base = f"1R{self.num_experts}E{self.top_k}K"
        return base if self.shared_size == 0 else f"{base}+S{self.shared_size}"


def factor_shape(intermediate_size: int, *, num_experts: int, top_k: int | None, shared_fraction: float) -> FactorShape:
    """Sizes for a dense FFN of `intermediate_size` neurons; `top_k` defaults to half the experts.

    The shared size is the multiple of `num_experts` granularity nearest to `shared_fraction * F` that leaves
    equal experts, so that S + N*H = F exactly.

    Args:
        num_experts: from `MIN_EXPERTS` to `MAX_EXPERTS`, as the options that give it have seen to.
        shared_fraction: from 0 up to, not including, 1, likewise.

    Raises:
        UsageError: when no equal split exists or K does not fit, naming the nearest valid values.
    """
    if shared_fraction == 0:
        shared_size = 0
        if intermediate_size % num_experts:
            raise UsageError(
                f"--experts {num_experts} does not divide intermediate_size {intermediate_size}",
                _other_splits(nearest_divisors(intermediate_size, num_experts)),
            )
    else:
        shared_size = nearest_shared_size(intermediate_size, num_experts, shared_fraction)
    chosen_k = num_experts // 2 if top_k is None else top_k
    if not 0 <= chosen_k <= num_experts:
        raise UsageError(
            f"--top-k {chosen_k} does not fit {num_experts} experts",
            f"choose a number from 0 to {num_experts}",
        )
    if chosen_k == 0 and shared_size == 0:
        raise UsageError(
            "--top-k 0 leaves no active neuron",
            "add --shared-fraction 0.5 (static pruning to half the neurons), or choose --top-k 1 or more",
        )
    return FactorShape(
        num_experts=num_experts,
        top_k=chosen_k,
        expert_size=(intermediate_size - shared_size) // num_experts,
        shared_size=shared_size,
    )


def nearest_divisors(intermediate_size: int, wanted: int) -> list[int]:
    """The numbers of experts on either side of `wanted` that divide `intermediate_size`."""
    valid = [n for n in range(MIN_EXPERTS, MAX_EXPERTS + 1) if intermediate_size % n == 0]
    below = [n for n in valid if n < wanted][-1:]
    above = [n for n in valid if n > wanted][:1]
    return below + above


def nearest_shared_size(intermediate_size: int, num_experts: int, shared_fraction: float) -> int:
    """The S > 0 nearest to `shared_fraction * F` for which the other neurons split into N equal experts.

    Raises:
        UsageError: when every such S leaves the experts empty.
    """
    wanted = shared_fraction * intermediate_size
    remainder = intermediate_size % num_experts
    sizes = range(remainder or num_experts, intermediate_size - num_experts + 1, num_experts)
    if not sizes:
        raise UsageError(
            f"--experts {num_experts} with shared neurons does not fit intermediate_size {intermediate_size}",
            f"try --experts {max(MIN_EXPERTS, intermediate_size // 4)} or fewer",
        )
    return min(sizes, key=lambda size: (abs(size - wanted), size))


def _other_splits(divisors: list[int]) -> str:
    """Shared neurons take up what a number of experts leaves over."""
    with_shared = "--shared-fraction 0.25, with which the number need not divide it"
    return f"try {' or '.join(map(str, divisors))}, or {with_shared}" if divisors else f"add {with_shared}"
