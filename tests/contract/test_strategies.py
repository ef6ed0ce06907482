"""What every partition strategy promises, checked on every one that is installed, third-party ones included.

    pytest tests/contract/test_strategies.py -k NAME

Layers are small and drawn at random: any number of experts from 2 to 128, any storage type, degenerate weights too.
A strategy gets just what it asks for: the statistics named by `needs()`, and None when it names none.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as draw
from torch.nn.functional import linear, silu

from factorctl.contracts import (
    DenseFFN,
    LayerStats,
    Partition,
    PartitionSpec,
    PartitionStrategy,
    Stat,
    TokenSample,
    UsageError,
    check_option_names,
    chooses_shared,
    validate,
)
from factorctl.partitions import available, contract_faults, get_strategy

NAMES = [row.name for row in available()]
"""Broken ones too: they fail `test_it_loads` with their fault."""

SHIPPED_VARIANTS = [
    ("clustered", {"by": "activations"}),
    ("clustered", {"by": "weights", "iterations": "1"}),
    ("routed", {"rounds": "0"}),
]
CASES = [(name, {}) for name in NAMES] + SHIPPED_VARIANTS
every_strategy = pytest.mark.parametrize(
    ("name", "options"),
    CASES,
    ids=["-".join([name, *(f"{key}={value}" for key, value in options.items())]) for name, options in CASES],
)
few_examples = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@dataclass(frozen=True)
class Layer:
    """One dense FFN to split, and how."""

    num_experts: int
    expert_size: int
    hidden_size: int = 5
    layer: int = 0
    seed: int = 0
    dtype: torch.dtype = torch.float32
    weights: str = "gaussian"
    biased: bool = False
    top_k: int | None = None
    shared_size: int = 0
    """Only for strategies that choose the shared neurons themselves."""

    @property
    def intermediate_size(self) -> int:
        return self.shared_size + self.num_experts * self.expert_size

    def spec(self, options: Mapping[str, str]) -> PartitionSpec:
        return PartitionSpec(self.num_experts, self.layer, self.seed, options, self.top_k, self.shared_size)

    def ffn(self) -> DenseFFN:
        generator = torch.Generator().manual_seed(self.intermediate_size)

        def values(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(self.dtype)

        F, D = self.intermediate_size, self.hidden_size
        gate_FD, up_FD, down_DF = values(F, D), values(F, D), values(D, F)
        if self.weights == "zero":
            gate_FD, up_FD, down_DF = (torch.zeros_like(weight) for weight in (gate_FD, up_FD, down_DF))
        if self.weights == "all alike":
            gate_FD, up_FD, down_DF = gate_FD[:1].repeat(F, 1), up_FD[:1].repeat(F, 1), down_DF[:, :1].repeat(1, F)
        if self.weights == "two kinds":
            gate_FD = gate_FD[torch.arange(F) % 2]
        biases = (values(F), values(F), values(D)) if self.biased else (None, None, None)
        return DenseFFN(gate_FD, up_FD, down_DF, *biases)

    def stats(self, needed: frozenset[Stat], tokens: int = 24) -> LayerStats | None:
        """The statistics in `needed` and no others; of degenerate weights, degenerate ones."""
        if not needed:
            return None
        generator = torch.Generator().manual_seed(tokens)
        F = self.intermediate_size
        share_F = torch.rand(F, generator=generator) if self.weights == "gaussian" else torch.zeros(F)
        patterns_PF = torch.rand(tokens, F, generator=generator) < share_F
        return LayerStats(
            tokens=tokens,
            importance_F=share_F if Stat.IMPORTANCE in needed else None,
            rate_F=patterns_PF.float().mean(0) if Stat.RATE in needed else None,
            patterns_PF=patterns_PF if Stat.PATTERNS in needed else None,
            sample=self.sample(tokens, generator) if Stat.TOKENS in needed else None,
        )

    def sample(self, tokens: int, generator: torch.Generator) -> TokenSample:
        x_TD = torch.randn(tokens, self.hidden_size, generator=generator)
        return TokenSample(x_TD, hidden_of(self.ffn(), x_TD), torch.rand(tokens, generator=generator))


def hidden_of(ffn: DenseFFN, x_TD: torch.Tensor) -> torch.Tensor:
    """silu(W_gate x + b_gate) * (W_up x + b_up) in float32, as calibration hands it out."""
    biases = (None if bias is None else bias.float() for bias in (ffn.gate_bias_F, ffn.up_bias_F))
    gate_TF, up_TF = (
        linear(x_TD, rows.float(), bias) for rows, bias in zip((ffn.gate_FD, ffn.up_FD), biases, strict=True)
    )
    return silu(gate_TF) * up_TF


layers = draw.builds(
    Layer,
    num_experts=draw.integers(2, 128),
    expert_size=draw.integers(1, 4),
    hidden_size=draw.integers(1, 9),
    layer=draw.integers(0, 200),
    seed=draw.integers(-(2**40), 2**70),
    dtype=draw.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    weights=draw.sampled_from(["gaussian", "zero", "all alike", "two kinds"]),
    biased=draw.booleans(),
    top_k=draw.sampled_from([None, 0, 1, 2]),
)


def split(strategy: PartitionStrategy, layer: Layer, options: Mapping[str, str]) -> Partition:
    return strategy.partition(layer.ffn(), layer.stats(strategy.needs(options)), layer.spec(options))


@pytest.mark.parametrize("name", NAMES)
def test_it_loads(name: str) -> None:
    strategy, provenance = get_strategy(name)
    assert contract_faults(strategy, name) == []
    assert provenance.name == strategy.name


@every_strategy
def test_it_asks_for_statistics_that_exist(name: str, options: Mapping[str, str]) -> None:
    strategy, _ = get_strategy(name)
    check_option_names(strategy, options)
    assert strategy.needs(options) <= set(Stat)


@pytest.mark.parametrize("name", NAMES)
def test_it_takes_an_odd_option_value_or_refuses_it_by_name(name: str) -> None:
    strategy, _ = get_strategy(name)
    value = "odd \N{SNOWMAN} value"
    for option in sorted(strategy.option_names):
        refusal = refusal_of(strategy, {option: value})
        if refusal is not None:
            assert value in refusal.message
            assert refusal.hint, "say what to choose instead"


def refusal_of(strategy: PartitionStrategy, options: Mapping[str, str]) -> UsageError | None:
    try:
        strategy.needs(options)
    except UsageError as refusal:
        return refusal
    return None


@every_strategy
@few_examples
@given(layer=layers)
def test_every_neuron_goes_to_one_of_equal_experts(name: str, options: Mapping[str, str], layer: Layer) -> None:
    strategy, _ = get_strategy(name)
    partition = split(strategy, layer, options)
    validate(partition, num_neurons=layer.intermediate_size, num_experts=layer.num_experts)


@pytest.mark.parametrize("name", [name for name in NAMES if chooses_shared(get_strategy(name)[0])])
@few_examples
@given(layer=layers, shared_size=draw.integers(1, 50))
def test_who_chooses_the_shared_neurons_chooses_as_many_as_asked(name: str, layer: Layer, shared_size: int) -> None:
    layer = replace(layer, shared_size=shared_size)
    validate(
        split(get_strategy(name)[0], layer, {}),
        num_neurons=layer.intermediate_size,
        num_experts=layer.num_experts,
        shared_size=shared_size,
    )


@every_strategy
@few_examples
@given(layer=layers)
def test_the_experts_add_up_to_the_dense_ffn(name: str, options: Mapping[str, str], layer: Layer) -> None:
    strategy, _ = get_strategy(name)
    partition = split(strategy, layer, options)
    ffn = double(layer.ffn())
    x_TD = torch.randn(3, layer.hidden_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total_TD = sum((neuron_sum(ffn.select(ids_H), x_TD) for ids_H in partition.experts_NH), torch.zeros_like(x_TD))
    torch.testing.assert_close(total_TD, neuron_sum(ffn, x_TD), rtol=1e-12, atol=1e-12)


@every_strategy
@few_examples
@given(layer=layers, global_seed=draw.integers(0, 100))
def test_the_same_arguments_give_the_same_split(
    name: str, options: Mapping[str, str], layer: Layer, global_seed: int
) -> None:
    """Torch's global random state neither decides the result nor moves: training after it stays reproducible."""
    strategy, _ = get_strategy(name)
    first = split(strategy, layer, options)
    torch.manual_seed(global_seed)
    before = torch.get_rng_state()
    again = split(get_strategy(name)[0], layer, options)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.permutation_F, again.permutation_F)


@every_strategy
def test_it_works_for_the_edges_of_the_range(name: str, options: Mapping[str, str]) -> None:
    strategy, _ = get_strategy(name)
    for num_experts, expert_size in [(2, 1), (2, 300), (3, 7), (128, 1), (128, 5)]:
        layer = Layer(num_experts, expert_size)
        validate(split(strategy, layer, options), num_neurons=layer.intermediate_size, num_experts=layer.num_experts)


@every_strategy
def test_every_layer_and_seed_can_be_split(name: str, options: Mapping[str, str]) -> None:
    strategy, _ = get_strategy(name)
    for index, seed in [(0, 0), (1, 0), (0, 1), (79, 2**63)]:
        layer = replace(Layer(4, 6), layer=index, seed=seed)
        validate(split(strategy, layer, options), num_neurons=24, num_experts=4)


@every_strategy
def test_weights_and_statistics_are_left_as_they_were(name: str, options: Mapping[str, str]) -> None:
    strategy, _ = get_strategy(name)
    layer = Layer(4, 6, dtype=torch.bfloat16, biased=True)
    ffn, stats = layer.ffn(), layer.stats(strategy.needs(options))
    strategy.partition(ffn, stats, layer.spec(options))
    assert_same_tensors(ffn, layer.ffn())
    if stats is not None:
        assert_same_tensors(stats, layer.stats(strategy.needs(options)))


PRINT_SPLITS = """
import sys
sys.path.insert(0, sys.argv[1])
from test_strategies import CASES, split_or_fault
for case in CASES:
    print(split_or_fault(*case))
"""


def split_or_fault(name: str, options: Mapping[str, str]) -> str:
    """One line; a strategy that fails must not hide what the others give."""
    try:
        return str(split(get_strategy(name)[0], Layer(8, 12), options).permutation_F.tolist())
    except Exception as fault:
        return f"{type(fault).__name__}: {fault}".replace("\n", " ")


@pytest.fixture(scope="module")
def elsewhere() -> list[str]:
    """The split of every case in `CASES`, made by another process with other string hashes."""
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", PRINT_SPLITS, os.path.dirname(__file__)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


@every_strategy
def test_another_process_gives_the_same_split(name: str, options: Mapping[str, str], elsewhere: list[str]) -> None:
    """A run that was killed and resumed writes the bytes that it would have written: no hash() and no set order."""
    split(get_strategy(name)[0], Layer(8, 12), options)
    assert elsewhere[CASES.index((name, options))] == split_or_fault(name, options)


def double(ffn: DenseFFN) -> DenseFFN:
    values = {field.name: getattr(ffn, field.name) for field in fields(ffn)}
    return DenseFFN(**{key: None if value is None else value.double() for key, value in values.items()})


def neuron_sum(ffn: DenseFFN, x_TD: torch.Tensor) -> torch.Tensor:
    """The FFN without its down bias, which belongs to no neuron: W_down (silu(W_gate x + b_gate) * (W_up x + b_up))."""
    gate_TF = torch.nn.functional.linear(x_TD, ffn.gate_FD, ffn.gate_bias_F)
    up_TF = torch.nn.functional.linear(x_TD, ffn.up_FD, ffn.up_bias_F)
    return (torch.nn.functional.silu(gate_TF) * up_TF) @ ffn.down_DF.T


def assert_same_tensors(first: DenseFFN | LayerStats | TokenSample, second: object) -> None:
    for field in fields(first):
        one, other = getattr(first, field.name), getattr(second, field.name)
        if isinstance(one, TokenSample):
            assert_same_tensors(one, other)
        else:
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, field.name
