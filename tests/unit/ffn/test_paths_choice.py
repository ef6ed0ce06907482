"""Which path is taken: shipped ladders, tuned ones, and a damaged cache file."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from factorctl.config.shape import FactorShape
from factorctl.ffn import choice as path_choice
from factorctl.ffn import layer as factored_ffn
from factorctl.ffn import tuned as tuned_paths
from factorctl.ffn.choice import GROUPED_COST_FLOPS, Site, path_at, shipped_steps
from factorctl.ffn.layer import FactoredFFN
from factorctl.ffn.paths import Steps
from factorctl.ffn.tuned import read_tuned, write_tuned

CPU = Site("a cpu", torch.float32, 576, FactorShape(4, 1, 384, 0), can_group=True)
REPORT = Path(__file__).parents[3] / "docs" / "benchmarks" / "2026-11-26-gpu-latency-h100.md"
GPU = Site("a gpu", torch.bfloat16, 2048, FactorShape(4, 1, 1408, 0), cuda=True, can_group=True)


def shipped_path_at_one(ffn: FactoredFFN) -> str:
    site = replace(CPU, hidden_size=ffn.hidden_size, shape=ffn.shape)
    return path_at(shipped_steps(site), 1)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FACTORCTL_CACHE", str(tmp_path))
    tuned_paths.forget()
    yield tmp_path / "paths.json"
    tuned_paths.forget()


@pytest.mark.parametrize(
    ("hidden_size", "n", "k", "h", "float32", "bfloat16"),
    [
        (576, 4, 1, 384, ((4, "loop"), (7, "masked"), (128, "loop")), ((2, "loop"), (60, "masked"))),
        (576, 4, 2, 384, ((1, "loop"), (22, "masked"), (64, "loop")), ((1, "loop"), (90, "masked"))),
        (576, 4, 3, 384, ((42, "masked"),), ((180, "masked"),)),
        (576, 64, 8, 24, ((1, "loop"), (90, "masked"), (256, "loop")), ((826, "masked"),)),
        (2048, 4, 1, 1408, ((128, "loop"),), ((9, "loop"),)),
        (2048, 4, 2, 1408, ((64, "loop"),), ((4, "loop"), (6, "masked"))),
        (2048, 64, 8, 88, ((256, "loop"),), ((5, "loop"), (63, "masked"))),
    ],
)
def test_a_cpu_reads_the_experts_chosen_then_all_then_gives_each_its_own_tokens(
    hidden_size: int, n: int, k: int, h: int, float32: Steps, bfloat16: Steps
) -> None:
    site = replace(CPU, hidden_size=hidden_size, shape=FactorShape(n, k, h, 0))
    assert shipped_steps(site) == (*float32, (None, "grouped"))
    assert shipped_steps(replace(site, dtype=torch.bfloat16)) == (*bfloat16, (None, "grouped"))


def test_a_cpu_that_learns_never_loops() -> None:
    assert shipped_steps(replace(CPU, learns=True)) == ((7, "masked"), (None, "grouped"))


def test_a_cpu_masks_where_rows_are_not_for_grouped() -> None:
    assert shipped_steps(replace(CPU, can_group=False)) == ((4, "loop"), (None, "masked"))


@pytest.mark.parametrize(
    ("dtype", "hidden_size", "expected"),
    [
        (torch.float32, 16, True),
        (torch.bfloat16, 16, True),
        (torch.float32, 13, False),
        (torch.bfloat16, 12, False),
        (torch.float64, 16, False),
    ],
)
def test_a_cpu_groups_rows_that_torch_takes(dtype: torch.dtype, hidden_size: int, expected: bool) -> None:
    site = path_choice.site_of(torch.device("cpu"), dtype, hidden_size, FactorShape(4, 2, 8, 0))
    assert site.can_group == expected


def measured_on_a_gpu() -> list[tuple[Site, int, dict[str, float]]]:
    """Every row of the FFN table: where it ran, its tokens, and microseconds of each path that was timed."""
    report = REPORT.read_text(encoding="utf-8").partition("## FFN layer")[2]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines() if line.startswith("| 1R")]
    found = []
    for split, tokens, _, *cells in rows:
        n, k = (int(number) for number in re.findall(r"R(\d+)E(\d+)K", split)[0])
        times = {path: float(us) for path, us in zip(("slot", "masked", "grouped"), cells, strict=False) if us}
        site = replace(GPU, hidden_size=576, shape=FactorShape(n, k, 1536 // n, 0))
        found.append((site, int(tokens), times))
    return found


def test_a_gpu_takes_what_was_fastest_on_an_h100() -> None:
    rows = measured_on_a_gpu()
    assert len(rows) == 47
    for site, tokens, times in rows:
        chosen = path_at(shipped_steps(site), tokens)
        assert times[chosen] <= 1.05 * min(times.values()), (site.key, tokens, chosen)


@pytest.mark.parametrize(
    ("hidden_size", "n", "k", "h", "slots"),
    [(576, 4, 1, 384, 1), (2048, 4, 1, 1408, 0), (2048, 4, 3, 1408, 0), (2048, 64, 8, 88, 1), (2048, 128, 1, 44, 25)],
)
def test_a_gpu_gathers_while_copying_costs_less_than_reading_all(
    hidden_size: int, n: int, k: int, h: int, slots: int
) -> None:
    steps = shipped_steps(replace(GPU, hidden_size=hidden_size, shape=FactorShape(n, k, h, 0)))
    assert max((tokens for tokens in range(1, 100) if path_at(steps, tokens) == "slot"), default=0) == slots
    assert path_at(steps, slots + 1) == "masked"


@pytest.mark.parametrize(("hidden_size", "n", "k", "h"), [(2048, 4, 1, 1408), (2048, 4, 2, 1408), (4096, 8, 2, 1792)])
def test_a_gpu_groups_once_that_saves_arithmetic_enough(hidden_size: int, n: int, k: int, h: int) -> None:
    steps = shipped_steps(replace(GPU, hidden_size=hidden_size, shape=FactorShape(n, k, h, 0)))
    (last, before), (_, then) = steps[-2:]
    assert (before, then) == ("masked", "grouped")
    assert last is not None
    saved = 6 * hidden_size * (n - k) * h
    assert last * saved <= GROUPED_COST_FLOPS < (last + 1) * saved


def test_huge_layers_on_a_gpu_group_behind_slot_at_once() -> None:
    huge = replace(GPU, hidden_size=8192, shape=FactorShape(2048, 1, 14, 0))
    assert shipped_steps(replace(huge, can_group=True))[:2] == ((409, "slot"), (None, "grouped"))


def test_training_on_a_gpu_groups_earlier() -> None:
    """What `masked` would keep for the backward pass is not in the memory that `finetune` expects."""
    learning = replace(GPU, hidden_size=576, shape=FactorShape(4, 2, 384, 0), learns=True)
    assert [path_at(shipped_steps(learning), tokens) for tokens in (448, 449)] == ["masked", "grouped"]
    assert path_at(shipped_steps(replace(learning, learns=False)), 16_384) == "masked"


def test_a_layer_says_whether_it_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def steps_for(*arguments: object) -> object:
        asked.append(arguments[-1])
        return ((None, "masked"),)

    monkeypatch.setattr(factored_ffn, "steps_for", steps_for)
    ffn = FactoredFFN(FactorShape(4, 2, 8, 0), 16, "silu")
    ffn.path_for(1)
    with torch.no_grad():
        ffn.path_for(1)
    ffn.requires_grad_(False).path_for(1)
    ffn.router.requires_grad_(True)
    ffn.path_for(1)
    assert asked == [True, False, True]


def test_a_gpu_that_cannot_group_masks() -> None:
    assert path_at(shipped_steps(replace(GPU, can_group=False)), 4096) == "masked"


def test_no_gpu_path_reads_the_routing_on_the_host() -> None:
    for k in (1, 2, 3):
        steps = shipped_steps(replace(GPU, shape=FactorShape(4, k, 1408, 0)))
        assert {path for _, path in steps} <= {"slot", "masked", "grouped"}


def test_tuned_steps_are_used_by_the_module(cache: Path) -> None:
    ffn = FactoredFFN(FactorShape(4, 2, 8, 0), 16, "silu")
    site = path_choice.site_of(torch.device("cpu"), torch.float32, 16, ffn.shape)
    write_tuned(cache, {site.key: ((5, "masked"), (None, "grouped"))})
    assert [ffn.path_for(t) for t in (1, 5, 6)] == ["masked", "masked", "grouped"]
    ffn.top_k = 1  # another site: not tuned
    assert ffn.path_for(1) == shipped_path_at_one(ffn)


def test_writing_keeps_other_sites_and_leaves_no_temporary_file(cache: Path) -> None:
    write_tuned(cache, {"one": ((None, "masked"),)})
    write_tuned(cache, {"two": ((3, "masked"), (None, "grouped"))})
    assert read_tuned(cache) == {"one": ((None, "masked"),), "two": ((3, "masked"), (None, "grouped"))}
    assert [file.name for file in cache.parent.iterdir()] == ["paths.json"]


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        json.dumps({"version": 0, "sites": {}}),
        json.dumps({"version": 1}),
        json.dumps({"version": 1, "sites": {"x": [[None, "teleport"]]}}),
        json.dumps({"version": 1, "sites": {"x": [[4, "grouped"]]}}),
        json.dumps({"version": 1, "sites": {"x": []}}),
        json.dumps({"version": 1, "sites": {"x": [["4", "grouped"], [None, "grouped"]]}}),
    ],
)
def test_a_damaged_cache_is_ignored_with_a_warning_and_replaced(cache: Path, content: str) -> None:
    cache.write_text(content)
    ffn = FactoredFFN(FactorShape(4, 2, 8, 0), 16, "silu")
    with pytest.warns(UserWarning, match="is damaged .*; using the shipped crossovers"):
        assert ffn.path_for(1) == shipped_path_at_one(ffn)
    tuned_paths.forget()
    with pytest.warns(UserWarning, match="is damaged"):
        write_tuned(cache, {"one": ((None, "masked"),)})
    assert read_tuned(cache) == {"one": ((None, "masked"),)}


def test_the_choice_ignores_what_is_routed_where() -> None:
    ffn = FactoredFFN(FactorShape(4, 2, 8, 0), 16, "silu")
    chosen = []
    for bias in (-100.0, 100.0):
        torch.nn.init.constant_(ffn.router, bias)
        chosen.append([ffn.path_for(t) for t in range(1, 600)])
    assert chosen[0] == chosen[1]


def test_k_of_all_experts_is_dense() -> None:
    assert FactoredFFN(FactorShape(4, 4, 8, 0), 16, "silu").path_for(1) == "dense"
