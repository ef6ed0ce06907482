"""The parts of an export by themselves: scale folding, hard gates, comparison, tokenizer names, RoPE factors, cards."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.tiny import COMMON
from support.tiny import dense_outline as model
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from factorctl.config.factorize import FactorizeConfig
from factorctl.config.option import command_line
from factorctl.config.quantities import parse_byte_count
from factorctl.config.shape import FactorShape
from factorctl.errors import UsageError
from factorctl.exporting.check.comparison import (
    FLOAT64_LIMIT,
    ExportMismatchError,
    compare,
    largest_error,
    require_near,
    require_same_routers,
)
from factorctl.exporting.check.hard_gate import agreement_and_error, choose_shifts
from factorctl.exporting.check.native import LayerRouting
from factorctl.exporting.check.near_ties import FLOAT64, Resolution, changed_choices, near_ties
from factorctl.exporting.check.text import spread_positions
from factorctl.exporting.features import features_of
from factorctl.exporting.gguf.tensors import chosen_quant, rope_factors, storage_type
from factorctl.exporting.gguf.tokenizer import PRE_TOKENIZERS, pre_tokenizer
from factorctl.exporting.stock.config import rope_keys
from factorctl.exporting.stock.folding import Folding, is_power_of_two, scale_rounding
from factorctl.ffn.spec import FactoredSpec

N, K, H, D = 4, 2, 12, 32


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    sizes = {"gate_up": (N, 2 * H, D), "down": (D, N * H), "router": (N, D)}
    return {name: torch.randn(*size).to(dtype) for name, size in sizes.items()}


def spec(top_k: int = K, gate: str = "softmax", **changes: Any) -> FactoredSpec:
    return FactoredSpec(FactorShape(N, top_k, H, 0), gate, changes.pop("scale", "sum"), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_a_power_of_two_folds_in_without_losing_a_bit(top_k: int, dtype: torch.dtype) -> None:
    native = tensors(dtype)
    down_NDH = Folding(spec(top_k), "none").stock_ffn(0, native).down_NDH
    original_NDH = native["down"].view(D, N, H).transpose(0, 1)
    assert down_NDH.dtype == dtype
    assert torch.equal(down_NDH / top_k, original_NDH)
    assert scale_rounding(spec(top_k), 0, native, None) == 0


def test_a_fitted_scale_is_folded_layer_by_layer_and_its_rounding_measured() -> None:
    native, fitted = tensors(torch.bfloat16), spec(scale="fitted", fitted_a=(1.3, 0.5))
    folding = Folding(fitted, "none")
    exact = native["down"].double().view(D, N, H).transpose(0, 1) * 1.3 * K
    assert torch.allclose(folding.stock_ffn(0, native).down_NDH.double(), exact, rtol=2**-8)
    assert 1e-4 < scale_rounding(fitted, 0, native, None) < 2**-8
    assert torch.equal(folding.stock_ffn(1, native).down_NDH, native["down"].view(D, N, H).transpose(0, 1))


def test_with_all_experts_on_the_router_is_zero_and_the_scale_n() -> None:
    ffn = Folding(spec(N, scale="paper"), "none").stock_ffn(0, tensors())
    assert not ffn.router_ND.any()
    assert torch.equal(ffn.down_NDH, tensors()["down"].view(D, N, H).transpose(0, 1) * N)


@pytest.mark.parametrize(("value", "expected"), [(1, True), (0.25, True), (3, False), (0, False), (-2, False)])
def test_powers_of_two(value: float, expected: bool) -> None:
    assert is_power_of_two(value) is expected


def test_router_scaling_brings_the_gates_near_and_keeps_the_experts() -> None:
    logits = [torch.randn(400, 8, generator=torch.Generator().manual_seed(layer)) for layer in range(3)]
    scaling = choose_shifts(logits, 3)
    assert min(scaling.shifts) >= 6
    assert scaling.selection_agreement > 0.99
    assert scaling.gate_error < 2e-2
    _, unscaled = agreement_and_error(logits[0], 3, 0)
    assert float(unscaled.mean().sqrt()) > 0.3


def test_router_scaling_stops_where_float32_no_longer_tells_experts_apart() -> None:
    logits = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    kept, _ = agreement_and_error(logits, 3, 24)
    assert not bool(kept.all())


def sequences(shift: float = 0.0, wrong: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(1)
    logits = [torch.randn(16, 50) for _ in range(8)]
    return [values + shift if index >= wrong else values.roll(1, dims=-1) for index, values in enumerate(logits)]


def test_equal_logits_agree() -> None:
    agreement = compare(sequences(), sequences(shift=1e-5))
    assert agreement.tokens == 128
    assert agreement.max_logit_error == pytest.approx(1e-5, rel=0.1)
    assert agreement.top1_agreement == 1
    assert agreement.kl < 1e-9


def test_one_sequence_that_differs_is_refused() -> None:
    error = largest_error(sequences(), sequences(wrong=1))
    assert error is not None
    assert error > 1
    with pytest.raises(ExportMismatchError, match=r"with every expert on, logits differ by 1\.\d+ of their spread"):
        require_near(error, FLOAT64_LIMIT, "with every expert on")


def test_what_follows_a_near_tie_is_not_judged() -> None:
    parted = [torch.cat([values[:5], values[5:].roll(1, dims=-1)]) for values in sequences()]
    assert largest_error(sequences(), parted, [5] * 8) == 0
    assert largest_error(sequences(), parted, [5] * 7 + [6]) > 0.1  # type: ignore[operator]
    assert largest_error(sequences(), parted, [0] * 8) is None
    require_near(None, FLOAT64_LIMIT, "as it is served")


def test_logits_that_are_no_numbers_are_refused() -> None:
    broken = [torch.full_like(values, math.nan) for values in sequences()]
    with pytest.raises(ExportMismatchError, match="logits differ by inf"):
        require_near(largest_error(sequences(), broken), 1e30, "as it is served")


def test_a_router_is_judged_expert_by_expert() -> None:
    """One expert's logits span a thousand times the others': a hundredth of a small one is seen all the same."""
    torch.manual_seed(0)
    router_logits = torch.randn(64, 4) * torch.tensor([1e-5, 1.0, 1e-5, 1e-5])
    require_same_routers([router_logits], [router_logits * (1 + 1e-6)], FLOAT64_LIMIT)
    stretched = router_logits * torch.tensor([1, 1, 1.01, 1])
    with pytest.raises(ExportMismatchError, match=r"expert 2 in layer 1 differ by 0\.01 of their size"):
        require_same_routers([router_logits] * 2, [router_logits, stretched], FLOAT64_LIMIT)


def routing(logits_TN: torch.Tensor) -> LayerRouting:
    return LayerRouting(logits_TN, logits_TN.topk(K, dim=-1).indices, torch.ones(len(logits_TN)))


def test_near_ties_are_found_at_the_boundary_and_nowhere_else() -> None:
    clear = torch.tensor([[3.0, 2.0, 1.0, 0.0]] * 6)
    tied, within = clear.clone(), clear.clone()
    tied[4] = torch.tensor([3.0, 2.0, 2.0 - 1e-9, 0.0])
    within[1] = torch.tensor([2.0 + 1e-9, 2.0, 1.0, 1.0])  # both are chosen, and neither: nothing hangs on it
    found = near_ties([routing(clear.double()), routing(tied.double()), routing(within.double())], [3, 3], FLOAT64)
    assert found.sound == [3, 1]
    assert found.share == pytest.approx(1 / 18)
    assert near_ties([routing(clear)], [3, 3], Resolution(0, 1.5)).sound == [0, 0]
    assert near_ties([], [3, 3], FLOAT64).sound == [3, 3]


def test_changed_choices_count_sets_of_experts() -> None:
    clear = torch.tensor([[3.0, 2.0, 1.0, 0.0]] * 4)
    other = clear.clone()
    other[0] = torch.tensor([2.0, 3.0, 1.0, 0.0])
    other[1] = torch.tensor([3.0, 1.0, 2.0, 0.0])
    assert changed_choices([routing(clear)], [routing(other)]) == 0.25


def test_candidates_are_compared_by_log_probability() -> None:
    native = sequences()
    best = [values.log_softmax(-1).topk(10) for values in native]
    candidates = [
        [list(zip(ids.tolist(), logs.tolist(), strict=True)) for ids, logs in zip(top.indices, top.values, strict=True)]
        for top in best
    ]
    agreement = compare(native, candidates)
    assert agreement.max_logit_error < 1e-6
    assert agreement.kl < 1e-6
    assert largest_error(native, candidates) < 1e-6  # type: ignore[operator]
    assert largest_error(sequences(wrong=8), candidates) > 0.5  # type: ignore[operator]


def test_every_second_sequence_is_spread_over_the_context() -> None:
    positions = spread_positions([[1] * 4, [1] * 4, [1]], 100)
    assert [list(places) for places in positions] == [[0, 1, 2, 3], [0, 33, 66, 99], [0]]


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_llama3_rope_factors_are_those_of_transformers() -> None:
    changes = {"rope_parameters": LLAMA3, "head_dim": 64, "max_position_embeddings": 131072}
    ours = rope_factors(features_of(model("llama", **changes)))["rope_freqs.weight"]
    config = LlamaConfig(**{**COMMON, **changes})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / (500000.0 ** (torch.arange(0, 64, 2) / 64))
    assert torch.allclose(plain / ours, scaled, rtol=1e-5)
    assert ours.min() == 1
    assert ours.max() == 32


def test_both_spellings_of_rope_are_written() -> None:
    keys = rope_keys(features_of(model("llama", rope_parameters=LLAMA3)))
    assert keys["rope_theta"] == keys["rope_parameters"]["rope_theta"] == 500000.0
    assert keys["rope_scaling"]["rope_type"] == "llama3"
    assert rope_keys(features_of(model("llama")))["rope_scaling"] is None


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def test_pre_tokenizers_are_named_by_what_they_do() -> None:
    digits = {"type": "Digits", "individual_digits": True}
    plain: dict[str, Any] = {"model": {"type": "BPE"}, "normalizer": None}
    assert pre_tokenizer({**plain, "pre_tokenizer": BYTE_LEVEL}) == "gpt-2"
    assert (
        pre_tokenizer({**plain, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, BYTE_LEVEL]}})
        == "smollm"
    )


def test_an_unknown_pre_tokenizer_is_refused_and_spelled_out() -> None:
    raw = {"model": {"type": "BPE"}, "normalizer": {"type": "Lowercase"}, "pre_tokenizer": BYTE_LEVEL}
    with pytest.raises(UsageError, match=r'not known here: \["Lowercase", "ByteLevel regex"\]') as refusal:
        pre_tokenizer(raw)
    assert all(name in str(refusal.value.hint) for name in PRE_TOKENIZERS.values())


def test_storage_types_follow_the_shape() -> None:
    assert storage_type("blk.0.ffn_up_exps.weight", (4, 12, 64), "q8_0").name == "Q8_0"
    assert storage_type("blk.0.ffn_down_exps.weight", (4, 64, 12), "q8_0").name == "F16"
    assert storage_type("blk.0.ffn_gate_inp.weight", (4, 64), "q8_0").name == "F32"
    assert storage_type("output_norm.weight", (64,), "bf16").name == "F32"
    assert chosen_quant("auto", torch.bfloat16) == "bf16"


def test_the_card_repeats_the_command_without_defaults() -> None:
    config = {"model": "demo", "num_experts": 8, "top_k": None, "refit": True, "strategy": None, "seed": 0}
    options = {**config, "strategy_options": {"by": "weights"}}
    assert command_line("factorize", FactorizeConfig, options, positional="demo") == (
        "factorctl factorize demo --experts 8 --option by=weights --refit"
    )


@pytest.mark.parametrize(("text", "size"), [("500MB", 5e8), ("2GB", 2e9), ("1.5 G", 1.5e9), ("123", 123), ("4k", 4000)])
def test_sizes(text: str, size: float) -> None:
    assert parse_byte_count(text, "--max-shard-size") == size
