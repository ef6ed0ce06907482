"""Whole-model speed: a TinyLlama-shaped model with random weights, prefill and batch-1 decoding, against its anchors.

    python tests/benchmarks/bench_model_latency.py --rounds 7 --out docs/benchmarks/<date>-latency-<machine>.md
    python tests/benchmarks/bench_model_latency.py --device cuda --dtype bfloat16 --batch 1,8,32 --prompt 512,4096

Random weights route random tokens near evenly, which is the hardest case for few tokens. 22 layers in float32 take
4.4 GB, the two plain anchors up to another 4.7 GB. With fewer `--layers` the head weighs more and ratios are lower.
Needs a quiet machine.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from factorctl.config.shape import FactorShape
from factorctl.ffn.layer import FactoredFFN
from factorctl.models.building import decoder_layers, factored_ffns
from factorctl.models.linears import use_few_token_linears
from factorctl.profiling.flops import count_flops, reduction
from factorctl.profiling.latency import Effort, Regime, measure_regime
from factorctl.profiling.roofline import Machine, ceiling, measure_machine
from factorctl.profiling.sizes import ModelSizes
from factorctl.profiling.variants import make_variants
from factorctl.reporting.hardware import look_at_hardware
from factorctl.reporting.statistics import ratio_of_medians, spread

WIDTH, INNER, VOCABULARY = 2048, 5632, 32000


def expected_experts_hit(num_experts: int, top_k: int, tokens: int) -> float:
    """N (1 - (1 - K/N)^T): experts that at least one of T uniformly routed tokens chooses."""
    return float(num_experts * (1 - (1 - top_k / num_experts) ** tokens))


def tinyllama(
    shape: FactorShape, layers: int, dtype: torch.dtype, device: torch.device, width: int = WIDTH
) -> PreTrainedModel:
    """TinyLlama-1.1B's sizes, factored, random weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=8192,
    )  # fmt: skip
    with device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for block in decoder_layers(model):
        block.mlp = FactoredFFN(shape, width, "silu", dtype=dtype, device=device)
        for parameter in block.mlp.parameters():
            nn.init.normal_(parameter, std=0.02)
        block.mlp.keep_experts_together()
    use_few_token_linears(model)
    return model.eval().requires_grad_(False)


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def report(
    shape: FactorShape, model: PreTrainedModel, machine: Machine, regime: Regime, effort: Effort, dtype: torch.dtype
) -> list[str]:
    """Two rows: prefill and decode."""
    sizes = ModelSizes.of(model.config, shape)
    ids = torch.randint(VOCABULARY, (regime.batch, regime.prompt + effort.decode_tokens), device=model.device)
    samples = measure_regime(make_variants(model), ids, regime, effort)
    rows = []
    for phase, new, context in (("prefill", regime.prompt, 0), ("decode", 1, regime.prompt)):
        times = {name: s.prefill_ms if phase == "prefill" else s.decode_ms for name, s in samples.items()}
        routed = regime.batch * new
        allowed = ceiling(
            sizes, machine, tokens=new, context=context, batch=regime.batch, itemsize=dtype.itemsize,
            experts_hit=expected_experts_hit(shape.num_experts, shape.top_k, routed),
        )  # fmt: skip
        speedup = ratio_of_medians(times["dense"], times["model"], seed=0)
        p50 = {name: spread(found).p50 for name, found in times.items()}
        path = next(iter(factored_ffns(model))).path_for(routed)
        cells = (
            shape.notation, phase, regime.batch, regime.prompt, path, f"{p50['dense']:.1f}", f"{p50['model']:.1f}",
            f"{speedup.median:.2f} [{speedup.low:.2f}, {speedup.high:.2f}]", f"{allowed:.2f}",
            f"{p50['narrow'] / p50['model']:.0%}", f"{p50['stock'] / p50['model']:.2f}", len(times["model"]),
        )  # fmt: skip
        rows.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--width", type=int, default=WIDTH, help="other than TinyLlama's, to see that all of this runs")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--batch", default="1")
    parser.add_argument("--prompt", default="512")
    parser.add_argument("--decode-tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--top-k", default="1,2")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    hardware = look_at_hardware(arguments.device, dtype)
    regimes = [Regime(batch, prompt) for prompt in numbers(arguments.prompt) for batch in numbers(arguments.batch)]
    effort = Effort(arguments.rounds, arguments.decode_tokens, arguments.seconds)
    lines = []

    def say(*more: str) -> None:
        lines.extend(more)
        print("\n".join(more), flush=True)

    say(
        f"TinyLlama's shape, {arguments.layers} layers, random weights, {arguments.dtype}, on {hardware.device}, "
        f"{hardware.threads} threads of {hardware.cores} cores, load {hardware.load_1min:g} at the start"
        f"{' (BUSY)' if hardware.busy else ''}, torch {torch.__version__}.",
        "",
    )
    table = [
        "| split | phase | batch | prompt | path | dense ms | model ms | speed-up | ceiling | of floor | against stock "
        "| samples |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    say(*table)
    saved = []
    for top_k in numbers(arguments.top_k):
        shape = FactorShape(4, top_k, INNER // 4, 0)
        model = tinyllama(shape, arguments.layers, dtype, arguments.device, arguments.width)
        sizes = ModelSizes.of(model.config, shape)
        machine = measure_machine(sizes, dtype, arguments.device)
        for regime in regimes:
            say(*report(shape, model, machine, regime, effort, dtype))
        dense, active = (count_flops(counted, regimes[0].prompt) for counted in (sizes.dense, sizes))
        saved.append(
            f"{shape.notation}: FFN FLOPs -{reduction(dense.ffn, active.ffn):.1%}, model FLOPs "
            f"-{reduction(dense.total, active.total):.1%}; {machine.gemm_flops / 1e9:.0f} GFLOP/s, "
            f"{machine.bandwidth / 1e9:.1f} GB/s measured."
        )
        del model
    say("", *saved)
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
