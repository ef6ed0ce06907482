"""FLOPs by hand, by the tool and by torch."""

from __future__ import annotations

import pytest
import torch
from support.tiny import make_model
from torch.nn import functional as F

from factorctl.config.shape import FactorShape
from factorctl.ffn.layer import FactoredFFN
from factorctl.profiling import flop_check
from factorctl.profiling.flop_check import FlopMismatchError, check_flops, counted_flops
from factorctl.profiling.flops import (
    attended_pairs,
    count_flops,
    experts_run_by,
    reduction,
    sweep_top_k,
)
from factorctl.profiling.sizes import ModelSizes

TINYLLAMA = ModelSizes(22, 2048, 32, 4, 64, 32000, FactorShape(4, 2, 1408, 0))


def factored(case: str = "llama", *, s: int = 8, k: int = 2, **changes):
    """A tiny model whose FFNs are factored, with random weights."""
    model = make_model(case, hidden_size=32, intermediate_size=48, **changes)
    shape = FactorShape(4, k, (48 - s) // 4, s)
    for block in model.model.layers:
        block.mlp = FactoredFFN(shape, 32, "silu")
        for parameter in block.mlp.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    model.requires_grad_(False)
    return model, ModelSizes.of(model.config, shape)


def test_tinyllama_by_hand() -> None:
    """Per token: 2 FLOPs per weight of 22 layers; the paper's model has 9.44M attention and 34.6M FFN weights each."""
    dense = count_flops(TINYLLAMA.dense, 1)
    assert dense.ffn == 2 * 22 * 3 * 2048 * 5632
    assert dense.attention_projections == 2 * 22 * (2048 * 2048 * 2 + 2048 * 256 * 2)
    assert dense.attention_core == 4 * 2048 * 22
    assert dense.head == 2 * 2048 * 32000
    assert dense.router == 0
    assert dense.total == dense.ffn + dense.attention + dense.head


@pytest.mark.parametrize(("k", "saved"), [(1, 0.75), (2, 0.5), (3, 0.25), (4, 0.0)])
def test_ffn_reduction_is_one_minus_k_over_n(k: int, saved: float) -> None:
    dense, model = count_flops(TINYLLAMA.dense, 512), count_flops(TINYLLAMA.with_top_k(k), 512)
    assert reduction(dense.ffn, model.ffn) == pytest.approx(saved)


def test_batches_positions_and_cores() -> None:
    one = count_flops(TINYLLAMA, 8)
    three = count_flops(TINYLLAMA, 8, batch=3)
    assert three.total == pytest.approx(3 * one.total)
    assert count_flops(TINYLLAMA, 8, head_positions=8).head == 8 * one.head
    assert attended_pairs(4, 0, "causal") == 10
    assert attended_pairs(4, 0, "full") == 16
    assert attended_pairs(1, 100, "causal") == attended_pairs(1, 100, "full") == 101
    assert attended_pairs(2, 3, "causal") == 4 + 5


def test_shared_neurons_are_counted_once_and_k_0_has_no_router() -> None:
    sizes = ModelSizes(1, 16, 2, 2, 8, 100, FactorShape(4, 1, 8, 32))
    flops = count_flops(sizes, 1)
    assert flops.shared_ffn == 2 * 3 * 16 * 32
    assert flops.ffn == 2 * 3 * 16 * 40
    assert flops.router == 2 * 16 * 4
    assert count_flops(sizes.with_top_k(0), 1).router == 0


def test_executed_experts_by_path() -> None:
    assert [experts_run_by(path, TINYLLAMA) for path in ("masked", "dense", "grouped", "loop")] == [4, 4, 2, 2]


def test_sweep_has_the_papers_rows() -> None:
    rows = sweep_top_k(TINYLLAMA, 128)
    assert [row.notation for row in rows] == ["1R4E1K", "1R4E2K", "1R4E3K", "dense"]
    assert [row.ffn_reduction for row in rows] == pytest.approx([0.75, 0.5, 0.25, 0.0])
    assert rows[-1].total_reduction == 0
    with_shared = ModelSizes(1, 16, 2, 2, 8, 100, FactorShape(4, 1, 8, 32))
    assert [row.top_k for row in sweep_top_k(with_shared, 8)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("case", ["llama", "qwen2", "gemma", "mistral"])
@pytest.mark.parametrize(("s", "k"), [(0, 1), (8, 2), (8, 0), (8, 4)])
def test_torch_counts_the_same(case: str, s: int, k: int) -> None:
    model, sizes = factored(case, s=s, k=k)
    assert check_flops(model, sizes, torch.randint(4, 30, (2, 24))) < 1e-3
    assert {(block.mlp.top_k, block.mlp.path) for block in model.model.layers} == {(k, "auto")}
    assert model.config._attn_implementation == "sdpa"


def test_a_wrong_count_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = factored()
    monkeypatch.setattr(flop_check, "counted_flops", lambda run: 1.002 * count_flops(sizes, 24, core="full").total)
    with pytest.raises(FlopMismatchError, match=r"24 tokens take .* FLOPs by factorctl's count but .* by torch's"):
        check_flops(model, sizes, torch.randint(4, 30, (1, 24)))


def test_grouped_mm_is_counted() -> None:
    """torch's counter knows no formula of its own for it and would count 0."""
    x_PD, weight_NHD = torch.randn(32, 16, dtype=torch.bfloat16), torch.randn(4, 8, 16, dtype=torch.bfloat16)
    ends_N = torch.tensor([8, 8, 24, 32], dtype=torch.int32)
    assert counted_flops(lambda: F.grouped_mm(x_PD, weight_NHD.transpose(1, 2), offs=ends_N)) == 2 * 32 * 16 * 8


@pytest.mark.parametrize(("path", "experts"), [("loop", 2), ("grouped", 2), ("masked", 4)])
def test_each_path_executes_what_is_claimed(path: str, experts: int) -> None:
    ffn = FactoredFFN(FactorShape(4, 2, 8, 0), 16, "silu", dtype=torch.bfloat16)
    for parameter in ffn.parameters():
        torch.nn.init.normal_(parameter)
    ffn.path = path
    router = 2 * 64 * 16 * 4
    counted = counted_flops(lambda: ffn(torch.randn(64, 16, dtype=torch.bfloat16)))
    assert counted == router + 64 * 2 * 3 * 16 * 8 * experts
