"""Prices on busy experts: the load falls, no more tokens move than must, and the router stays linear."""

from __future__ import annotations

import pytest
import torch

from factorctl.calibration.closed_form import with_prices
from factorctl.ffn.labels import expert_counts
from factorctl.ffn.routing import logit_spread

T, D, N = 2000, 32, 8


def crowded() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A router that most tokens agree on, inputs with a common part, and u with <u, x> near 1."""
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(T, D, generator=generator)
    x_TD[:, 0] = 4 + 0.1 * x_TD[:, 0]
    router_ND = torch.randn(N, D, generator=generator)
    router_ND[:, 0] = torch.linspace(-1, 1, N)
    unit_D = torch.linalg.lstsq(x_TD, torch.ones(T, 1)).solution[:, 0]
    return x_TD, router_ND, unit_D


def load_of(router_ND: torch.Tensor, x_TD: torch.Tensor, top_k: int) -> torch.Tensor:
    return expert_counts((x_TD @ router_ND.T).topk(top_k, dim=1).indices, N) / (T * top_k / N)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("limit", [1.1, 1.5])
def test_no_expert_is_chosen_more_often_than_the_limit(top_k: int, limit: float) -> None:
    x_TD, router_ND, unit_D = crowded()
    assert float(load_of(router_ND, x_TD, top_k).max()) > limit
    spread = float(logit_spread(x_TD @ router_ND.T))
    priced_ND = with_prices(router_ND, unit_D, x_TD, top_k=top_k, limit=limit, spread=spread)
    assert float(load_of(priced_ND, x_TD, top_k).max()) <= limit + 1e-6


def test_a_looser_limit_moves_fewer_tokens() -> None:
    x_TD, router_ND, unit_D = crowded()
    before = (x_TD @ router_ND.T).argmax(1)
    spread, moved = float(logit_spread(x_TD @ router_ND.T)), []
    for limit in (1.1, 1.5, 2.5):
        priced_ND = with_prices(router_ND, unit_D, x_TD, top_k=1, limit=limit, spread=spread)
        moved.append(float(((x_TD @ priced_ND.T).argmax(1) != before).float().mean()))
    assert moved == sorted(moved, reverse=True)
    assert moved[-1] < 0.5


def test_a_router_within_the_limit_stays_as_it_is() -> None:
    x_TD, router_ND, unit_D = crowded()
    assert torch.equal(with_prices(router_ND, unit_D, x_TD, top_k=1, limit=N, spread=1.0), router_ND)
