"""Fill the computed tables of docs/scale.md from the formulas that factorctl itself plans with; `--check` compares.

Sizes are those of public architectures, put together on the meta device: no weight is read or made.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from factorctl.checkpoint.manifest import Manifest
from factorctl.config.factorize import CALIBRATION_TOKENS
from factorctl.config.finetune import FinetuneConfig
from factorctl.config.shape import factor_shape
from factorctl.ffn.spec import FactoredSpec
from factorctl.models.building import empty_dense_model, empty_factored_model, factored_ffns
from factorctl.models.families import DenseModel, dense_model
from factorctl.pipeline.factorize.plan import peak_bytes, shard_of
from factorctl.pipeline.finetune.memory import expected_memory
from factorctl.profiling.flops import count_flops
from factorctl.profiling.sizes import ModelSizes
from factorctl.training.optimizers import choose_trained
from factorctl.training.presets import recipe_of

PAGE = Path(__file__).with_name("scale.md")
START, END = "<!-- computed: made by docs/render_scale.py -->", "<!-- end of computed -->"
MODELS: dict[str, tuple[int, ...]] = {
    "TinyLlama 1.1B": (22, 2048, 5632, 32, 4, 32_000),
    "Llama 2 7B": (32, 4096, 11_008, 32, 32, 32_000),
    "Llama 3 70B": (80, 8192, 28_672, 64, 8, 128_256),
}
"""Layers, width, FFN neurons, heads, key-value heads, vocabulary."""
SUSTAINED = {"1 x H100": (1, 400e12), "8 x H100": (8, 350e12)}
"""GPUs and the bf16 FLOPs per second of each that a dense fine-tuning run is taken to sustain."""
TOKENS = 40_000_000
EXPERTS, TOP_K, SHARED = 8, 2, 0.25


def dense_of(name: str) -> DenseModel:
    layers, width, inner, heads, kv_heads, vocabulary = MODELS[name]
    config = {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
    return dense_model(config, origin=name)


def training_memory(dense: DenseModel, *, gpus: int, lean: bool) -> int:
    """Bytes per GPU: the planner's own figure, bf16, micro-batch 1 x 2048, gradient checkpointing."""
    shape = factor_shape(dense.intermediate_size, num_experts=EXPERTS, top_k=TOP_K, shared_fraction=SHARED)
    spec = FactoredSpec(shape, "softmax", "sum")
    optimizer: Any = "adamw-8bit" if lean else None
    quant: Any = "4bit" if lean else "none"
    config = FinetuneConfig(tokens=TOKENS, gradient_checkpointing=True, optimizer=optimizer, teacher_quant=quant)
    recipe = recipe_of(config, shape.active_ffn_fraction)
    model = empty_factored_model(dense, spec).requires_grad_(False)
    choose_trained(factored_ffns(model), "all", recipe.weights)
    plan: Any = SimpleNamespace(
        config=config,
        recipe=recipe,
        spec=spec,
        device=torch.device("cuda"),
        compute_dtype=torch.bfloat16,
        checkpoint=SimpleNamespace(dense=dense, manifest=Manifest),
        batch=SimpleNamespace(micro_batch=1, block_length=2048, world_size=gpus),
        teacher=SimpleNamespace(),  # refitted: the teacher's FFNs are the source's
        sharded=gpus > 1,
    )
    return sum(expected_memory(plan, model).values())


def factorize_memory(dense: DenseModel, tokens: int) -> int:
    """Peak bytes of `factorize` as its plan estimates them, for a bf16 checkpoint; with tokens it also refits."""
    shards: dict[str, int] = {}
    for name, parameter in empty_dense_model(dense).named_parameters():
        shard = shard_of(name)
        shards[shard] = shards.get(shard, 0) + 2 * parameter.numel()
    return peak_bytes(
        dense, max(shards.values()), calibration_tokens=tokens, hands_out_tokens=tokens > 0, refit=tokens > 0
    )


def training_flops_per_token(dense: DenseModel) -> float:
    """Teacher forward, labels, student forward and backward twice its forward, with layers computed again."""
    shape = factor_shape(dense.intermediate_size, num_experts=EXPERTS, top_k=TOP_K, shared_fraction=SHARED)
    sizes = ModelSizes.of(dense.config, shape)
    tokens = 2048
    student = count_flops(sizes, tokens).total / tokens
    teacher = count_flops(sizes.dense, tokens).total / tokens
    labels = 6 * dense.hidden_size * (dense.intermediate_size - shape.shared_size) * dense.num_layers
    head = 2 * dense.hidden_size * int(dense.config.vocab_size)
    return teacher + labels + 4 * student + 5 * head


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


def hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def tables() -> Iterator[str]:
    calibrated = (CALIBRATION_TOKENS["cpu"], CALIBRATION_TOKENS["cuda"])
    named = " | ".join(f"calibrated on {tokens:,} tokens" for tokens in calibrated)
    yield f"| model | weights, bf16 | factorize, weights only | {named} |"
    yield "|---|---:|---:|---:|---:|"
    for name in MODELS:
        dense = dense_of(name)
        weights = 2 * sum(p.numel() for p in empty_dense_model(dense).parameters())
        sizes = [weights, *(factorize_memory(dense, tokens) for tokens in (0, *calibrated))]
        yield f"| {name} | {' | '.join(map(gigabytes, sizes))} |"
    yield ""
    yield "| model | finetune, one GPU | one GPU, adamw-8bit, 4-bit teacher | each of 8, FSDP2 | 40M tokens, " + (
        ", ".join(SUSTAINED) + " |"
    )
    yield "|---|---:|---:|---:|---:|"
    for name in MODELS:
        dense = dense_of(name)
        memory = [
            training_memory(dense, gpus=1, lean=False),
            training_memory(dense, gpus=1, lean=True),
            training_memory(dense, gpus=8, lean=False),
        ]
        flops = training_flops_per_token(dense) * TOKENS
        times = ", ".join(hours(flops / (gpus * rate)) for gpus, rate in SUSTAINED.values())
        yield f"| {name} | {' | '.join(gigabytes(one) for one in memory)} | {times} |"


def render(page: str) -> str:
    before, rest = page.split(START)
    return f"{before}{START}\n" + "\n".join(tables()) + f"\n{END}{rest.split(END)[1]}"


def main() -> int:
    page = PAGE.read_text(encoding="utf-8")
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(render(page), encoding="utf-8")
        return 0
    if render(page) == page:
        return 0
    sys.stderr.write(f"{PAGE.name} is not what the formulas give: run `make docs`\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
