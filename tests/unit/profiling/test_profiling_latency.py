"""The anchors compute what they claim; the harness runs what it claims."""

from __future__ import annotations

import pytest
import torch
from test_profiling_flops import factored

from factorctl.ffn.kernel.cpu import is_available
from factorctl.models.building import factored_ffns
from factorctl.profiling.attribution import ffn_cost
from factorctl.profiling.expert_load import layer_load, mean_hits, route_text
from factorctl.profiling.flops import count_flops
from factorctl.profiling.latency import Effort, Regime, measure_regime, run_round, text_batch
from factorctl.profiling.roofline import Machine, ceiling, least_seconds
from factorctl.profiling.runtime import EagerRuntime, GraphRuntime, synchronised_clock
from factorctl.profiling.tuning import ladder, time_paths
from factorctl.profiling.variants import make_variants
from factorctl.progress import SilentProgress
from factorctl.reporting.hardware import Hardware

CPU = torch.device("cpu")


def ids(batch: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(4, 30, (batch, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
@pytest.mark.parametrize("case", ["llama", "gemma"])
@pytest.mark.parametrize("s", [0, 8])
def test_anchors_are_the_models_that_they_stand_for(case: str, s: int) -> None:
    model, _ = factored(case, s=s)
    variants = make_variants(model)
    logits = {name: variant(ids()).logits for name, variant in variants.items()}
    torch.testing.assert_close(logits["stock"], logits["dense"], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits["model"], logits["dense"], atol=1e-3)
    for block in variants["narrow"].model.layers:
        assert block.mlp.shape.intermediate_size == s + 2 * (48 - s) // 4
    for ffn in factored_ffns(model):
        assert ffn.top_k == 2
        ffn.top_k = 4
    torch.testing.assert_close(model(ids()).logits, logits["dense"])


def test_anchors_share_every_weight_but_the_plain_ffns() -> None:
    model, _ = factored()
    variants = make_variants(model)
    assert variants["dense"].model.layers[0].mlp.gate_up is model.model.layers[0].mlp.gate_up
    assert variants["narrow"].model.layers[0].self_attn.q_proj.weight is model.model.layers[0].self_attn.q_proj.weight
    assert variants["stock"].lm_head.weight is model.lm_head.weight


@torch.no_grad()
def test_decoding_with_a_cache_gives_the_logits_of_one_long_prompt() -> None:
    model, _ = factored()
    whole = model(ids()).logits
    graph = GraphRuntime(model, 24, {"backend": "aot_eager"})
    # `loop` reads the routing on the host; CUDA's paths do not, and only they are compiled.
    for ffn in factored_ffns(model):
        ffn.path = "masked"
    for runtime in (EagerRuntime(model), graph):
        for _ in range(2):  # a second prefill starts over
            last = [runtime.prefill(ids()[:, :20])]
            last += [runtime.decode(ids()[:, i : i + 1]) for i in range(20, 24)]
            torch.testing.assert_close(torch.cat(last, 1), whole[:, 19:], atol=1e-4, rtol=1e-4)


def test_a_round_times_one_prefill_and_every_step() -> None:
    class Recorder:
        def __init__(self) -> None:
            self.shapes: list[tuple[int, ...]] = []

        def prefill(self, ids_BP: torch.Tensor) -> torch.Tensor:
            self.shapes.append(tuple(ids_BP.shape))
            return torch.zeros(2, 1, 5)

        decode = prefill

    recorder, ticks = Recorder(), iter(range(100))
    prefill_ms, decode_ms = run_round(recorder, ids(), Regime(2, 10), 3, lambda: float(next(ticks)))
    assert recorder.shapes == [(2, 10), (2, 1), (2, 1), (2, 1)]
    assert prefill_ms == 1000
    assert decode_ms == [1000, 1000, 1000]


def test_every_variant_gets_as_many_samples() -> None:
    model, _ = factored()
    samples = measure_regime(make_variants(model), ids(), Regime(2, 8), Effort(rounds=4, decode_tokens=2, seconds=60))
    assert set(samples) == {"model", "dense", "narrow", "stock"}
    assert {(len(s.prefill_ms), len(s.decode_ms)) for s in samples.values()} == {(4, 8)}
    short = measure_regime(make_variants(model), ids(), Regime(2, 8), Effort(rounds=9, decode_tokens=1, seconds=0))
    assert {len(s.prefill_ms) for s in short.values()} == {3}


def test_text_batch_repeats_short_text_and_starts_rows_apart() -> None:
    assert text_batch(torch.arange(10), 2, 4).tolist() == [[0, 1, 2, 3], [5, 6, 7, 8]]
    assert text_batch(torch.arange(3), 1, 5).tolist() == [[0, 1, 2, 0, 1]]


def test_ceiling_goes_from_weights_read_to_arithmetic_done() -> None:
    _, sizes = factored(s=0, k=1)
    slow_memory = Machine(gemm_flops=1e18, bandwidth=1e9)
    slow_arithmetic = Machine(gemm_flops=1e9, bandwidth=1e18)
    common = {"context": 0, "batch": 1, "itemsize": 4}
    one = ceiling(sizes, slow_memory, tokens=1, experts_hit=1, **common)
    all_hit = ceiling(sizes, slow_memory, tokens=64, experts_hit=4, **common)
    many = ceiling(sizes, slow_arithmetic, tokens=64, experts_hit=4, **common)
    assert all_hit < 1.01 < one
    assert many > 1.3
    # One token, arithmetic alone: the ceiling's denominator is FLOPs over rate.
    least = least_seconds(sizes, slow_arithmetic, tokens=1, experts_hit=1, **common)
    assert least == pytest.approx(count_flops(sizes, 1).total / 1e9)


def test_expert_load_of_one_layer() -> None:
    load = layer_load(3, torch.tensor([[0, 1], [0, 2], [0, 1], [0, 3]]), 4)
    assert load.share == [1.0, 0.5, 0.25, 0.25]
    assert load.max_share == 1
    assert sum(load.share) == 2
    assert load.expected_hits(1) == pytest.approx(2)
    assert load.expected_hits(1000) == pytest.approx(4)
    assert mean_hits([], 3, 10) == 3


def test_routed_text_sees_every_layer() -> None:
    model, _ = factored()
    routed = route_text(model, ids(1, 24))
    assert len(routed.loads) == len(routed.inputs_LTD) == 2
    assert routed.inputs_LTD[0].shape == (24, 32)
    assert sum(routed.loads[0].share) == pytest.approx(2)
    model, _ = factored(k=0)
    assert route_text(model, ids(1, 24)).loads == []


def test_ffn_cost_reports_path_and_bytes() -> None:
    model, sizes = factored(s=8)
    text = route_text(model, ids(1, 24))
    for ffn in factored_ffns(model):
        ffn.path = "loop"
    cost = ffn_cost(model, sizes, text, 30, itemsize=4)
    assert cost.path == "loop"
    assert cost.dense_weight_mbytes == pytest.approx(48 * 3 * 32 * 4 / 1e6)
    assert cost.weight_mbytes <= cost.dense_weight_mbytes
    assert cost.executed_share == pytest.approx((8 + 2 * 10) / 48)
    assert all(ffn.top_k == 2 for ffn in factored_ffns(model))


def test_ladder_steps_between_the_counts_and_ignores_noise() -> None:
    timings = {
        1: {"masked": 1.0, "grouped": 2.0},
        4: {"masked": 2.0, "grouped": 1.99},
        16: {"masked": 8.0, "grouped": 4.0},
        64: {"masked": 30.0, "grouped": 9.0},
    }
    assert ladder(timings) == ((8, "masked"), (None, "grouped"))
    assert ladder({1: {"masked": 1.0, "grouped": 2.0}}) == ((None, "masked"),)
    assert ladder({1: {"loop": 1.0, "masked": 2.0}, 2: {"masked": 1.0}}) == ((1, "loop"), (None, "masked"))


def test_timing_paths_puts_back_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("factorctl.profiling.tuning.TOKEN_COUNTS", (1, 4))
    model, _ = factored()
    timings = time_paths(model, route_text(model, ids(1, 24)), SilentProgress())
    assert set(timings) == {1, 4}
    kernel = {"kernel"} if is_available() else set()
    grouped = {"grouped"} if next(iter(factored_ffns(model))).serves_grouped else set()
    assert set(timings[1]) == {"loop", "masked"} | grouped | kernel
    assert set(timings[4]) == {"loop", "masked"} | grouped | kernel
    assert {ffn.path for ffn in factored_ffns(model)} == {"auto"}


def test_busy_means_more_work_than_cores() -> None:
    quiet = Hardware("cpu", "float32", "cpu", cores=2, threads=2, memory_bytes=1, load_1min=1.9)
    assert not quiet.busy
    assert Hardware("cpu", "float32", "cpu", cores=2, threads=2, memory_bytes=1, load_1min=2.1).busy


def test_clock_counts_seconds() -> None:
    clock = synchronised_clock(CPU)
    assert 0 <= clock() - clock() + 1 <= 1
