"""Which path is taken: shipped ladders, tuned ones, and a damaged cache file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from factorctl.config import FactorShape
from factorctl.models import path_choice, tuned_paths
from factorctl.models.factored_ffn import FactoredFFN
from factorctl.models.path_choice import Site, path_at, shipped_steps
from factorctl.models.tuned_paths import read_tuned, write_tuned

CPU = Site("a cpu", torch.float32, 576, FactorShape(4, 1, 384, 0))
GPU = Site("a gpu", torch.bfloat16, 2048, FactorShape(4, 1, 1408, 0), cuda=True, can_group=True)


def shipped_path_at_one(ffn: FactoredFFN) -> str:
    site = replace(CPU, hidden_size=ffn.hidden_size, shape=replace(ffn.shape, top_k=ffn.top_k))
    return path_at(shipped_steps(site), 1)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FACTORCTL_CACHE", str(tmp_path))
    tuned_paths.forget()
    yield tmp_path / "paths.json"
    tuned_paths.forget()


def test_a_cpu_skips_for_few_tokens_masks_and_loops_for_many() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        steps = shipped_steps(replace(CPU, dtype=dtype))
        assert [path_at(steps, tokens) for tokens in (1, 2, 12, 1024)] == ["single", "skip", "masked", "loop"]


def test_one_token_masks_where_calls_for_small_experts_cost_more_than_they_save() -> None:
    fine = replace(CPU, shape=FactorShape(64, 8, 24, 0))
    assert path_at(shipped_steps(fine), 1) == "single"
    assert path_at(shipped_steps(replace(fine, dtype=torch.bfloat16)), 1) == "masked"


def test_skipping_ends_where_hardly_an_expert_goes_unread() -> None:
    def last_skip(num_experts: int, top_k: int, dtype: torch.dtype) -> int:
        steps = shipped_steps(replace(CPU, dtype=dtype, shape=FactorShape(num_experts, top_k, 1536 // num_experts, 0)))
        return max((t for t in range(2, 100) if path_at(steps, t) == "skip"), default=1)

    assert [last_skip(n, k, torch.float32) for n, k in ((4, 2), (8, 2), (64, 8))] == [3, 4, 1]
    assert [last_skip(n, k, torch.bfloat16) for n, k in ((4, 2), (8, 2), (64, 8))] == [1, 1, 1]
    wide = replace(CPU, hidden_size=2048, dtype=torch.bfloat16, shape=FactorShape(4, 1, 1408, 0))
    assert [path_at(shipped_steps(wide), tokens) for tokens in (1, 4, 8)] == ["single", "skip", "skip"]


def test_large_layers_never_mask_on_a_cpu() -> None:
    large = replace(CPU, hidden_size=4096, shape=FactorShape(8, 1, 1792, 0))
    assert {path for _, path in shipped_steps(large)} == {"single", "loop"}


def test_small_experts_and_fewer_bits_need_more_tokens_to_loop() -> None:
    def first_loop(site: Site) -> int:
        return next(t for t in range(1, 10_000) if path_at(shipped_steps(site), t) == "loop")

    fine = replace(CPU, shape=FactorShape(64, 16, 24, 0))
    assert first_loop(CPU) < first_loop(fine)
    assert first_loop(CPU) < first_loop(replace(CPU, dtype=torch.bfloat16))


def test_large_experts_loop_while_some_go_unread_or_each_has_rows_enough() -> None:
    wide = replace(CPU, hidden_size=2048, shape=FactorShape(4, 2, 1408, 0))
    assert [path_at(shipped_steps(wide), tokens) for tokens in (1, 2, 4)] == ["single", "loop", "loop"]
    most = replace(wide, shape=FactorShape(4, 3, 1408, 0))
    assert [path_at(shipped_steps(most), tokens) for tokens in (8, 85, 86)] == ["masked", "masked", "loop"]


@pytest.mark.parametrize(("n", "k", "slots"), [(4, 1, 3), (4, 2, 1), (64, 8, 7), (4, 3, 1)])
def test_a_gpu_gathers_while_it_reads_fewer_experts_than_there_are(n: int, k: int, slots: int) -> None:
    steps = shipped_steps(replace(GPU, shape=FactorShape(n, k, 88, 0)))
    assert path_at(steps, slots) == "slot"
    assert path_at(steps, slots + 1) == "masked"
    assert path_at(steps, 4096) == "grouped"


def test_a_gpu_that_cannot_group_masks() -> None:
    assert path_at(shipped_steps(replace(GPU, can_group=False)), 4096) == "masked"


def test_no_gpu_path_reads_the_routing_on_the_host() -> None:
    for k in (1, 2, 3):
        steps = shipped_steps(replace(GPU, shape=FactorShape(4, k, 1408, 0)))
        assert {path for _, path in steps} <= {"slot", "masked", "grouped"}


def test_tuned_steps_are_used_by_the_module(cache: Path) -> None:
    ffn = FactoredFFN(FactorShape(4, 2, 8, 0), 16, "silu")
    site = path_choice.site_of(torch.device("cpu"), torch.float32, 16, ffn.shape)
    write_tuned(cache, {site.key: ((5, "masked"), (None, "loop"))})
    assert [ffn.path_for(t) for t in (1, 5, 6)] == ["masked", "masked", "loop"]
    ffn.top_k = 1  # another site: not tuned
    assert ffn.path_for(1) == shipped_path_at_one(ffn)


def test_writing_keeps_other_sites_and_leaves_no_temporary_file(cache: Path) -> None:
    write_tuned(cache, {"one": ((None, "masked"),)})
    write_tuned(cache, {"two": ((3, "skip"), (None, "loop"))})
    assert read_tuned(cache) == {"one": ((None, "masked"),), "two": ((3, "skip"), (None, "loop"))}
    assert [file.name for file in cache.parent.iterdir()] == ["paths.json"]


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        json.dumps({"version": 0, "sites": {}}),
        json.dumps({"version": 1}),
        json.dumps({"version": 1, "sites": {"x": [[None, "teleport"]]}}),
        json.dumps({"version": 1, "sites": {"x": [[4, "loop"]]}}),
        json.dumps({"version": 1, "sites": {"x": []}}),
        json.dumps({"version": 1, "sites": {"x": [["4", "loop"], [None, "loop"]]}}),
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
