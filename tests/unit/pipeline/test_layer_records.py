"""Reading back what factorize recorded, from manifests of any age or origin."""

from __future__ import annotations

from typing import Any

import pytest

from factorctl.pipeline.common.layer_records import recorded_load


def test_the_load_is_read_back_by_layer() -> None:
    records = [{"expert_load": [0.5, 0.5]}, {"expert_load": [0.9, 0.1], "near_ties": 0.0}]
    assert recorded_load(records) == [[0.5, 0.5], [0.9, 0.1]]


@pytest.mark.parametrize("odd", [{}, {"expert_load": None}, {"expert_load": []}, {"expert_load": ["x"]}, 3, None])
def test_a_layer_without_a_load_gives_none_at_all(odd: Any) -> None:
    assert recorded_load([{"expert_load": [0.5, 0.5]}, odd]) == []
    assert recorded_load([]) == []
