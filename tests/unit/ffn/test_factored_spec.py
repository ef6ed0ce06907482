"""Sizes, gate and scale: what is legal, what each layer's `a` is, and what a damaged config is told."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factorctl.config.shape import FactorShape, factor_shape, nearest_divisors
from factorctl.errors import IntegrityError, UsageError
from factorctl.ffn.spec import DomainRouting, FactoredSpec

SHAPE = FactorShape(num_experts=4, top_k=2, expert_size=9, shared_size=12)


@given(
    size=st.integers(8, 4000), experts=st.integers(2, 128), fraction=st.floats(0, 0.99, exclude_min=True)
)  # any share of any width
def test_shared_and_routed_neurons_always_add_up(size: int, experts: int, fraction: float) -> None:
    if size < experts + (size % experts or experts):
        with pytest.raises(UsageError, match="or fewer"):
            factor_shape(size, num_experts=experts, top_k=None, shared_fraction=fraction)
        return
    shape = factor_shape(size, num_experts=experts, top_k=None, shared_fraction=fraction)
    assert shape.intermediate_size == size
    assert shape.expert_size >= 1
    assert shape.shared_size >= 1
    best = min(range(size % experts or experts, size - experts + 1, experts), key=lambda s: abs(s - fraction * size))
    assert abs(shape.shared_size - fraction * size) <= abs(best - fraction * size) + 1e-9


@given(size=st.integers(2, 3000), wanted=st.integers(2, 128))
def test_the_values_that_are_named_do_divide(size: int, wanted: int) -> None:
    named = nearest_divisors(size, wanted)
    assert all(size % value == 0 and value != wanted for value in named)
    between = range(min(named, default=wanted) + 1, max(named, default=wanted))
    assert not [v for v in between if v != wanted and size % v == 0 and v not in named] or len(named) < 2


def test_notation_and_fractions() -> None:
    assert SHAPE.notation == "1R4E2K+S12"
    assert SHAPE.intermediate_size == 48
    assert SHAPE.active_neurons == 30
    assert factor_shape(48, num_experts=4, top_k=None, shared_fraction=0).notation == "1R4E2K"
    assert factor_shape(48, num_experts=3, top_k=None, shared_fraction=0).top_k == 1


@pytest.mark.parametrize(
    ("scale", "top_k", "expected"),
    [("sum", 2, 1.0), ("paper", 2, 2.0), ("paper", 1, 4.0), ("paper", 4, 1.0), ("paper", 0, 1.0), ("fitted", 2, 0.7)],
)
def test_the_layer_s_a(scale: Any, top_k: int, expected: float) -> None:
    fitted = (0.5, 0.7) if scale == "fitted" else ()
    spec = FactoredSpec(SHAPE, "softmax", "sum").with_top_k(top_k)
    assert FactoredSpec(spec.shape, "softmax", scale, fitted).scale_a(1) == expected


def test_another_top_k() -> None:
    fitted = FactoredSpec(SHAPE, "softmax", "fitted", (0.5, 0.7))
    assert fitted.with_top_k(4).scale_a(0) == 1.0
    assert fitted.with_top_k(0).scale_a(0) == 1.0
    assert fitted.with_top_k(2).scale_a(0) == 0.5
    assert fitted.with_top_k(3, "paper").scale_a(0) == pytest.approx(4 / 3)
    with pytest.raises(UsageError, match="were fitted for top-k 2, not 3"):
        fitted.with_top_k(3)
    with pytest.raises(UsageError, match="holds no fitted scales"):
        FactoredSpec(SHAPE, "softmax", "sum").with_top_k(2, "fitted")
    for bad in (-1, 5):
        with pytest.raises(UsageError, match=f"--top-k {bad} does not fit 4 experts"):
            fitted.with_top_k(bad)
    bare = FactoredSpec(FactorShape(4, 2, 12, 0), "softmax", "sum")
    with pytest.raises(UsageError, match="leaves no active neuron"):
        bare.with_top_k(0)


def read(raw: dict[str, Any]) -> FactoredSpec:
    return FactoredSpec.from_json(raw, num_layers=2, intermediate_size=48, origin="config.json")


def test_json_there_and_back() -> None:
    for spec in (FactoredSpec(SHAPE, "hard", "fitted", (0.1, 1 / 3)), FactoredSpec(SHAPE, "softmax", "paper")):
        assert read(spec.to_json()) == spec


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts": 5}, {"num_experts": "4"}, {"num_experts": True}, {"num_experts": -4}, {"top_k": 5},
        {"expert_size": 10}, {"shared_size": None}, {"gate": "loud"}, {"scale": "huge"}, {"fitted_a": [1.0]},
        {"fitted_a": [1.0, float("nan")]}, {"fitted_a": ["1", "2"]}, {"fitted_a": None},
        {"scale": "fitted", "fitted_a": []},
    ],
    ids=str,
)  # fmt: skip
def test_damaged_json(changes: dict[str, Any]) -> None:
    raw = {**FactoredSpec(SHAPE, "softmax", "sum").to_json(), **changes}
    with pytest.raises(IntegrityError, match=r"config\.json: the factored part"):
        read(raw)
    missing = FactoredSpec(SHAPE, "softmax", "sum").to_json()
    del missing["gate"]
    with pytest.raises(IntegrityError, match="damaged"):
        read(missing)


DOMAINS = {"names": ["code", "wiki"], "top_k": 2}


def test_domains_are_kept_and_only_where_there_are_any() -> None:
    plain = FactoredSpec(SHAPE, "softmax", "sum")
    assert "domains" not in plain.to_json()
    raw = plain.to_json() | {"domains": DOMAINS}
    found = FactoredSpec.from_json(raw, num_layers=1, intermediate_size=48, origin="here")
    assert found.domains == DomainRouting(("code", "wiki"), 2)
    assert found.to_json() == raw
    assert found.with_top_k(4).domains == found.domains
    with pytest.raises(UsageError, match="were chosen by domain, 2 for each, not 3"):
        found.with_top_k(3)


@pytest.mark.parametrize(
    "domains", [{}, {"names": [], "top_k": 2}, {"names": ["a"], "top_k": 4}, {"names": [1], "top_k": 2}, [], "ab"]
)
def test_damaged_domains_are_called_so(domains: Any) -> None:
    raw = FactoredSpec(SHAPE, "softmax", "sum").to_json() | {"domains": domains}
    with pytest.raises(IntegrityError, match="the factored part is damaged"):
        FactoredSpec.from_json(raw, num_layers=1, intermediate_size=48, origin="here")
