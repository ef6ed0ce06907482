"""What the parts of factorctl promise one another: values in, a partition out.

Shapes are written into names: T tokens, D hidden_size, F intermediate_size, N num_experts, H expert_size,
S shared_size (S + N*H = F), P sampled calibration tokens. This module imports nothing of factorctl but its errors,
so a partition strategy, shipped or third-party, needs `factorctl.contracts` and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from factorctl.errors import FactorctlError
from factorctl.errors import UsageError as UsageError  # re-exported: all that a plugin needs is here
from factorctl.errors import did_you_mean as did_you_mean

if TYPE_CHECKING:
    import torch

PARTITION_ENTRY_POINTS = "factorctl.partitions"
"""Entry-point group through which every strategy, shipped or third-party, is found."""

PATTERN_TOKENS = 4096
"""The most calibration tokens for which `LayerStats.patterns_PF` keeps a row."""
SAMPLE_TOKENS = 16_384
"""The most calibration tokens in a `LayerStats.sample`."""


class Stat(StrEnum):
    """A calibration statistic that a strategy can ask for in `PartitionStrategy.needs`."""

    IMPORTANCE = "importance"
    """Per neuron: root mean square of the hidden activation times the norm of its down-projection column."""
    RATE = "rate"
    """Per neuron: share of tokens for which it is among the most active tenth of the layer (CMoE)."""
    PATTERNS = "patterns"
    """Per sampled token and neuron: whether the neuron is among that token's most active tenth (CMoE)."""
    TOKENS = "tokens"
    """The inputs of the FFN on a sample of the calibration tokens, and what each token counts for."""


@dataclass(frozen=True)
class DenseFFN:
    """The weights of one gated FFN: FFN(x) = W_down (act(W_gate x + b_gate) * (W_up x + b_up)) + b_down."""

    gate_FD: torch.Tensor
    up_FD: torch.Tensor
    down_DF: torch.Tensor
    gate_bias_F: torch.Tensor | None = None
    up_bias_F: torch.Tensor | None = None
    down_bias_D: torch.Tensor | None = None

    @property
    def intermediate_size(self) -> int:
        return int(self.gate_FD.shape[0])

    @property
    def hidden_size(self) -> int:
        return int(self.gate_FD.shape[1])

    def select(self, neurons: torch.Tensor) -> DenseFFN:
        """The same FFN with only `neurons` (ids, [n]) in the given order; the down bias stays whole."""
        return DenseFFN(
            gate_FD=self.gate_FD[neurons],
            up_FD=self.up_FD[neurons],
            down_DF=self.down_DF[:, neurons],
            gate_bias_F=None if self.gate_bias_F is None else self.gate_bias_F[neurons],
            up_bias_F=None if self.up_bias_F is None else self.up_bias_F[neurons],
            down_bias_D=self.down_bias_D,
        )


@dataclass(frozen=True)
class TokenSample:
    """Calibration tokens as one FFN sees them, evenly spread over the text and in its order.

    All in float32, on the device that calibrates.
    """

    x_TD: torch.Tensor
    """Inputs of the FFN."""
    hidden_TF: torch.Tensor
    """act(W_gate x + b_gate) * (W_up x + b_up): what the down-projection is applied to."""
    weight_T: torch.Tensor
    """What a token's squared error counts for: the inverse of the residual stream's size there."""

    def select(self, neurons: torch.Tensor) -> TokenSample:
        """The same tokens with the activations of `neurons` (ids, [n]) in the given order."""
        return TokenSample(self.x_TD, self.hidden_TF[:, neurons], self.weight_T)


@dataclass(frozen=True)
class LayerStats:
    """What calibration saw of one dense FFN. A field that no one asked for is None."""

    tokens: int
    importance_F: torch.Tensor | None = None
    rate_F: torch.Tensor | None = None
    patterns_PF: torch.Tensor | None = None
    sample: TokenSample | None = None

    def select(self, neurons: torch.Tensor) -> LayerStats:
        """The statistics of `neurons` (ids, [n]) in the given order."""
        return LayerStats(
            tokens=self.tokens,
            importance_F=None if self.importance_F is None else self.importance_F[neurons],
            rate_F=None if self.rate_F is None else self.rate_F[neurons],
            patterns_PF=None if self.patterns_PF is None else self.patterns_PF[:, neurons],
            sample=None if self.sample is None else self.sample.select(neurons),
        )


@dataclass(frozen=True)
class PartitionSpec:
    """What is asked of a strategy for one layer."""

    num_experts: int
    layer: int
    seed: int
    options: Mapping[str, str] = field(default_factory=dict)
    top_k: int | None = None
    """Experts that will be active per token; None where that is not known."""
    shared_size: int = 0
    """Neurons that the strategy is to make shared; 0 unless it says `chooses_shared`."""


@dataclass(frozen=True)
class Partition:
    """Where every neuron of a dense FFN goes: the ids of the experts' neurons and of the shared ones."""

    experts_NH: torch.Tensor
    shared_S: torch.Tensor | None = None

    @property
    def permutation_F(self) -> torch.Tensor:
        """Neuron ids in storage order: shared neurons first, then expert after expert."""
        import torch

        routed = self.experts_NH.reshape(-1)
        return routed if self.shared_S is None else torch.cat([self.shared_S, routed])


@runtime_checkable
class PartitionStrategy(Protocol):
    """One way of splitting a layer's routed neurons into `spec.num_experts` experts of equal size.

    `partition` sees only the neurons to be routed: shared neurons are taken out before and need no care here. A
    strategy with the attribute `chooses_shared = True` sees all neurons, and returns `spec.shared_size` of them as
    `shared_S`. `ffn` and `stats` hold the same neurons in the same order; return ids into that order.
    The result must be the same for the same arguments, on every run.
    """

    name: str
    reference: str
    """Paper or URL, copied into the manifest."""
    option_names: frozenset[str]
    """Keys that `spec.options` may hold; others are refused before `partition` is called."""

    def needs(self, options: Mapping[str, str]) -> frozenset[Stat]:
        """The statistics that these options use; empty means weights only, and calibration is skipped.

        Called before any weight is read: raise `UsageError` here for a bad option value.
        """
        ...

    def partition(self, ffn: DenseFFN, stats: LayerStats | None, spec: PartitionSpec) -> Partition: ...


def chooses_shared(strategy: PartitionStrategy) -> bool:
    """Whether the strategy takes the choice of the shared neurons upon itself; most leave it to the pipeline."""
    return bool(getattr(strategy, "chooses_shared", False))


class InvalidPartitionError(FactorctlError):
    """A strategy returned something that is no partition of the neurons into equal experts."""


def validate(partition: Partition, *, num_neurons: int, num_experts: int, shared_size: int = 0) -> Partition:
    """Return `partition` if each of the neurons is placed exactly once and the experts are equal in size.

    Raises:
        InvalidPartitionError: naming the first rule that is broken.
    """
    import torch

    experts = partition.experts_NH
    expected = (num_experts, (num_neurons - shared_size) // num_experts)
    if tuple(experts.shape) != expected:
        raise InvalidPartitionError(
            f"experts_NH has shape {tuple(experts.shape)}; {num_neurons} neurons with {shared_size} shared "
            f"in {num_experts} experts need {expected}"
        )
    shared = 0 if partition.shared_S is None else partition.shared_S.numel()
    if shared != shared_size:
        raise InvalidPartitionError(f"shared_S holds {shared} neurons; {shared_size} were asked for")
    ids = partition.permutation_F
    if ids.dtype.is_floating_point or ids.dtype == torch.bool:
        raise InvalidPartitionError(f"neuron ids must be integers, not {ids.dtype}")
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= num_neurons):
        raise InvalidPartitionError(f"neuron ids must lie in 0..{num_neurons - 1}")
    counts = torch.bincount(ids.long(), minlength=num_neurons)
    wrong = torch.nonzero(counts != 1).flatten()
    if wrong.numel():
        neuron = int(wrong[0])
        raise InvalidPartitionError(
            f"{wrong.numel()} neurons are not placed exactly once; "
            f"neuron {neuron} is placed {int(counts[neuron])} times"
        )
    return partition


def check_option_names(strategy: PartitionStrategy, options: Mapping[str, str]) -> None:
    """Refuse `--option` keys that the strategy does not know.

    Raises:
        UsageError: with the closest known key.
    """
    for key in options:
        if key not in strategy.option_names:
            raise UsageError(
                f"strategy '{strategy.name}' has no option '{key}'", did_you_mean(key, strategy.option_names)
            )


StrategyFactory = Callable[[], PartitionStrategy]
"""What an entry point of the group `factorctl.partitions` names: a class or function that makes the strategy."""
