"""Which splits are tried, which lose, which one is meant, and what a search keeps between runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from factorctl.config.frontier import FrontierConfig
from factorctl.config.quantities import parse_duration
from factorctl.config.shape import FactorShape
from factorctl.errors import UsageError
from factorctl.pipeline.frontier.points import Point, best, front, marked, why_hopeless
from factorctl.pipeline.frontier.search import between
from factorctl.pipeline.frontier.splits import coarse_to_fine, families, name_of, static_shape, swept
from factorctl.pipeline.frontier.state import SearchState
from factorctl.reporting.statistics import Estimate

F = 1536


def point(shape: FactorShape, *, perplexity: float, speed: float, drift: float = 0.1) -> Point:
    """A measured point of a model whose dense perplexity is 10 and accuracy 1/2."""
    return Point(
        name=name_of(shape),
        kind="routed" if shape.top_k else "static",
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        expert_size=shape.expert_size,
        shared_size=shape.shared_size,
        active_ffn_fraction=shape.active_ffn_fraction,
        drift=drift,
        ffn_gflops=1.0,
        total_gflops=2.0,
        ffn_flops_reduction=0.5,
        total_flops_reduction=0.2,
        export_target="hf",
        export_bytes=1,
        engines={"transformers": True},
        perplexity=perplexity,
        accuracy=5 / perplexity,
        accuracy_kept=10 / perplexity,
        perplexity_kept=10 / perplexity,
        prefill=Estimate(speed * 1.1, speed, speed * 1.2),
        decode=Estimate(speed, speed * 0.9, speed * 1.1),
    )


def static(active: int, **found: float) -> Point:
    return point(static_shape(F, active), **found)


def routed(top_k: int, **found: float) -> Point:
    return point(FactorShape(8, top_k, 144, 384), **found)


def test_the_grid_has_a_static_split_beside_every_routed_one_and_spans_it_from_the_start() -> None:
    grid = coarse_to_fine(families(FrontierConfig(model="m"), F))
    assert len(grid) == 12
    assert [name_of(shape) for shape in grid[:6:2]] == ["static-960", "static-672", "static-1248"]
    assert [shape.top_k for shape in grid[1::2]] == [4, 2, 6, 1, 3, 5]
    for beside, shape in zip(grid[::2], grid[1::2], strict=True):
        assert beside.top_k == 0
        assert beside.active_neurons == shape.active_neurons
        assert beside.intermediate_size == shape.intermediate_size == F


def test_a_partition_is_found_for_the_middle_of_the_numbers_of_active_experts() -> None:
    shapes = families(FrontierConfig(model="m", experts=(8, 32), shared_fraction=(0.25, 0.125)), F)
    assert [(shape.num_experts, shape.shared_size) for shape in shapes] == [(8, 384), (8, 192), (32, 384), (32, 192)]
    for shape in shapes:
        several = swept(shape)
        assert shape.top_k in several[1:-1]
        assert len(several) <= 6
        assert all(replace(shape, top_k=k).active_ffn_fraction <= 0.85 for k in several)


@pytest.mark.parametrize("width", [48, 49, 172, 1536, 8191])
def test_static_splits_fit_every_width(width: int) -> None:
    for active in range(2, width, 7):
        shape = static_shape(width, active)
        assert shape.intermediate_size == width
        assert active - 1 <= shape.active_neurons <= active
        assert shape.active_neurons < width


def test_a_point_that_is_slower_and_worse_loses() -> None:
    slow, fast, beaten = (
        static(960, perplexity=14, speed=1.2),
        static(384, perplexity=40, speed=2),
        routed(4, perplexity=15, speed=1.1),
    )
    found = marked([slow, fast, beaten], "decode")
    assert [one.dominated_by for one in found] == [None, None, "static-960"]
    assert [one.name for one in front(found, "decode")] == ["static-960", "static-384"]


def test_of_two_alike_neither_loses() -> None:
    assert [p.dominated_by for p in marked([static(960, perplexity=14, speed=1.2)] * 2, "decode")] == [None, None]


@pytest.mark.parametrize(
    ("budgets", "expected"),
    [
        ({"speed_up": 1.3}, "1R8E3K+S384"),
        ({"speed_up": 1.3, "active": 0.5}, "static-672"),
        ({"active": 0.6}, "1R8E3K+S384"),
        ({"keep": 0.45}, "static-672"),
        ({"keep": 0.55}, "1R8E3K+S384"),
        ({"keep": 0.65}, "static-1104"),
        ({"speed_up": 1.43, "phase": "prefill"}, "1R8E3K+S384"),
        ({"speed_up": 3.0}, None),
    ],
)
def test_the_point_that_is_meant(budgets: dict[str, float], expected: str | None) -> None:
    points = [
        static(1104, perplexity=14, speed=1.2),
        routed(3, perplexity=16, speed=1.31),
        static(672, perplexity=20, speed=1.6),
    ]
    found = best(points, FrontierConfig(model="m", **budgets))  # type: ignore[arg-type]
    assert (None if found is None else found.name) == expected


def test_a_split_is_hopeless_where_one_that_is_no_slower_is_far_nearer_to_dense() -> None:
    config, shape = FrontierConfig(model="m"), FactorShape(8, 3, 144, 384)
    nearer = static(768, perplexity=14, speed=1.2, drift=0.1)
    assert why_hopeless(0.12, shape, [nearer], config) is None
    reason = why_hopeless(0.2, shape, [nearer], config)
    assert reason == "behind a third of the layers 2.0 times as far from dense as static-768"
    assert why_hopeless(0.2, FactorShape(8, 1, 144, 384), [nearer], config) is None, "it runs fewer neurons"


def test_a_static_split_is_not_dropped_for_a_routed_one_which_may_be_slower() -> None:
    nearer = routed(1, perplexity=14, speed=1.2, drift=0.1)
    assert why_hopeless(0.5, static_shape(F, 960), [nearer], FrontierConfig(model="m")) is None


def test_a_split_is_hopeless_where_a_nearer_one_already_keeps_too_little() -> None:
    failed = static(960, perplexity=20, speed=1.2, drift=0.1)
    shape = FactorShape(8, 1, 144, 384)
    assert why_hopeless(0.2, shape, [failed], FrontierConfig(model="m", keep=0.4)) is None
    reason = why_hopeless(0.2, shape, [failed], FrontierConfig(model="m", keep=0.9))
    assert reason == "behind a third of the layers farther from dense than static-960, which keeps too little"


def test_between_two_splits_the_one_is_tried_that_should_just_meet_the_budget() -> None:
    config = FrontierConfig(model="m", speed_up=1.5)
    points = [static(512, perplexity=20, speed=2.0), static(1024, perplexity=14, speed=1.0)]
    wanted = between(points, config, F)
    assert wanted is not None
    assert wanted.active_neurons == 742, "nine tenths of the way from 512 to 768"
    assert between([*points, static(742, perplexity=16, speed=1.52)], config, F) is None, "one so near was tried"
    assert between(points, FrontierConfig(model="m"), F) is None, "without a budget there is nothing to meet"


def test_a_share_of_active_neurons_is_met_exactly() -> None:
    points = [static(512, perplexity=20, speed=2.0), static(1024, perplexity=14, speed=1.0)]
    wanted = between(points, FrontierConfig(model="m", active=0.5), F)
    assert wanted is not None
    assert wanted.active_neurons == 768


def test_a_point_survives_being_written_and_read() -> None:
    found = routed(3, perplexity=16, speed=1.3)
    assert Point.from_json(found.to_json()) == found
    dropped = replace(found, perplexity=None, prefill=None, decode=None, dropped="too far")
    assert Point.from_json(dropped.to_json()) == dropped


def test_what_was_kept_is_found_again_and_nothing_else(tmp_path: Path) -> None:
    state = SearchState(tmp_path, "this work")
    ids = torch.arange(6, dtype=torch.int32).view(2, 3)
    state.keep("a", {"x": 1}, {"ids": ids})
    assert SearchState(tmp_path, "this work").found("a") == {"x": 1}
    assert torch.equal(state.tensors("a")["ids"], ids)
    assert state.found("b") is None
    assert SearchState(tmp_path, "other work").found("a") is None


@pytest.mark.parametrize("name", ["a.json", "a.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_nothing_damaged_or_half_written_is_taken_for_whole(tmp_path: Path, name: str, damage: str) -> None:
    state = SearchState(tmp_path, "this work")
    state.keep("a", {"x": 1}, {"ids": torch.arange(6)})
    file = tmp_path / name
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content[:-3] if damage == "cut" else content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    assert state.found("a") is None


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("10m", 600), ("1.5h", 5400)])
def test_times_as_people_write_them(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0m", "soon", "-5m", "10 minutes"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no time") as caught:
        parse_duration(text)
    assert caught.value.hint == "write for example 90s, 10m or 1.5h"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"active": 1.5}, "--active 1.5 is out of range"),
        ({"keep": 0.0}, "--keep 0 is out of range"),
        ({"speed_up": -1.0}, "--speed-up -1 is out of range"),
        ({"experts": (8, 1)}, "--experts 8,1 is out of range\nHint: choose numbers from 2 to 128"),
        ({"experts": ()}, "--experts nothing is out of range"),
        ({"shared_fraction": (1.0,)}, "--shared-fraction 1 is out of range"),
        ({"rounds": 0}, "--rounds 0 is no positive number"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        FrontierConfig(model="m", **options)  # type: ignore[arg-type]
