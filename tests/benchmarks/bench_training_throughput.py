"""Training throughput: a step of the factored model against the same step of the dense model, in one harness.

    python tests/benchmarks/bench_training_throughput.py --threads 2

The dense anchor is plain dense fine-tuning of the same FFNs plus the dense teacher's forward pass. Steps take turns in
one process; needs a quiet machine. Exits with 1 where the bar is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from reporting import header, report_path, write_report

from factorctl.config.finetune import FinetuneConfig
from factorctl.config.shape import factor_shape
from factorctl.ffn.spec import FactoredSpec
from factorctl.models.building import empty_factored_model
from factorctl.models.families import dense_model
from factorctl.training.distiller import Distiller
from factorctl.training.optimizers import choose_trained, make_optimizers
from factorctl.training.presets import LossWeights, TrainingRecipe, recipe_of
from factorctl.training.teacher import own_tensors, teacher_ffn
from factorctl.training.twin_ffn import TwinFFN, TwinOptions

BAR_RATIO = 0.6
LAYERS = 6
"""Decoder layers of the throughput model: the demo model's shapes, a fifth of its depth."""


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of one step")
    parser.add_argument("--layers", type=int, default=LAYERS, help="decoder layers; the demo model has 30")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    return parser.parse_args(words)


def demo_shapes(layers: int) -> dict[str, Any]:
    """The demo model's configuration, less deep."""
    return {
        "model_type": "llama",
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": layers,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }


def make_distiller(
    num_experts: int,
    top_k: int,
    shared: float,
    recipe: TrainingRecipe,
    dtype: torch.dtype,
    device: str,
    layers: int = LAYERS,
) -> Distiller:
    """Random weights: the time of a step does not depend on them, but for how evenly a random router spreads."""
    dense = dense_model(demo_shapes(layers), origin="benchmark")
    shape = factor_shape(dense.intermediate_size, num_experts=num_experts, top_k=top_k, shared_fraction=shared)
    model = empty_factored_model(dense, FactoredSpec(shape, "softmax", "sum"))
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(tensor.shape, generator=generator) * 0.02 for name, tensor in model.named_parameters()}
    values |= {name: torch.ones(tensor.shape) for name, tensor in model.named_parameters() if "norm" in name}
    model.load_state_dict(values, strict=False, assign=True)
    for block in model.model.layers:
        block.mlp.neuron_ids = torch.arange(shape.intermediate_size, dtype=torch.int32)
    model.tie_weights()
    model.to(device)
    model.requires_grad_(False)
    students = [block.mlp for block in model.model.layers]
    choose_trained(students, "all", recipe.weights)
    options = TwinOptions(
        recipe.weights,
        None,
        dtype,
        learns_sharpness=recipe.sharpness_lr > 0,
        labels_from=recipe.labels_from,
    )
    for block, student in zip(model.model.layers, students, strict=True):
        block.mlp = TwinFFN(student, teacher_ffn(student, own_tensors(student), "none", dtype), options)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and not name.endswith(".router"):
            parameter.data = parameter.data.to(dtype)
    return Distiller(model, options, 1.0)


@dataclass
class Contender:
    """One model with its optimisers, and the wall and processor seconds of its steps."""

    name: str
    distiller: Distiller
    optimizers: list[torch.optim.Optimizer]
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    """Over all threads: what a busy machine does not inflate."""

    def step(self, ids_BL: torch.Tensor, positions_BL: torch.Tensor) -> tuple[float, float]:
        """Wall and processor seconds of one whole step."""
        started, cpu_started = time.perf_counter(), time.process_time()
        self.distiller(ids_BL, positions_BL).total.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if ids_BL.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started, time.process_time() - cpu_started


def contenders(arguments: argparse.Namespace) -> list[Contender]:
    """Dense first: all experts on, no labels, plain distillation, which also is fine-tuning plus a teacher forward."""
    dtype = torch.bfloat16 if arguments.precision == "bfloat16" else torch.float32
    ours = recipe_of(FinetuneConfig(tokens=1), 0.5)
    plain = replace(ours, weights=LossWeights(kd=1.0))
    sizes = {
        "dense + teacher forward": (4, 4, 0.0, plain),
        "1R4E2K": (4, 2, 0.0, ours),
        "1R8E3K+S384": (8, 3, 0.25, ours),
        "1R32E11K+S384": (32, 11, 0.25, ours),
    }
    made = []
    for name, (experts, top_k, shared, recipe) in sizes.items():
        distiller = make_distiller(experts, top_k, shared, recipe, dtype, arguments.device, arguments.layers)
        made.append(Contender(name, distiller, make_optimizers(distiller, recipe)))
    return made


def main() -> int:
    arguments = parse(sys.argv[1:])
    torch.set_num_threads(arguments.threads)
    entrants = contenders(arguments)
    ids_BL = torch.randint(49_000, (1, arguments.tokens), generator=torch.Generator().manual_seed(0))
    ids_BL, positions_BL = ids_BL.to(arguments.device), torch.arange(arguments.tokens, device=arguments.device)[None]
    for round_ in range(arguments.rounds + 1):
        for entrant in entrants if round_ % 2 else reversed(entrants):
            seconds, cpu_seconds = entrant.step(ids_BL, positions_BL)
            if round_:  # the first is warm-up
                entrant.seconds.append(seconds)
                entrant.cpu_seconds.append(cpu_seconds)
    text = header("Training throughput") + "\n".join(["", *table_lines(entrants, arguments), ""])
    topic = f"training-throughput-{arguments.precision}" + ("" if arguments.device == "cpu" else "-cuda")
    write_report(report_path(topic), text)
    ratios = [median_ratio(entrants[0].seconds, entrant.seconds) for entrant in entrants[1:]]
    return 0 if min(ratios) >= BAR_RATIO else 1


def median_ratio(dense: list[float], entrant: list[float]) -> float:
    """Tokens per second against dense: the median over rounds of the ratio of neighbours in time."""
    return statistics.median(d / e for d, e in zip(dense, entrant, strict=True))


def table_lines(entrants: list[Contender], arguments: argparse.Namespace) -> Iterator[str]:
    yield f"{arguments.layers} decoder layers of the demo model's shapes, one step of {arguments.tokens} tokens in "
    yield f"{arguments.precision} on {arguments.device}, {arguments.rounds} rounds, interleaved, order reversed in "
    yield "every other round. Dense: all FFNs trained by distillation from a dense teacher's forward pass. Factored: "
    yield f"the `default` preset, PAR labels included. The bar is {BAR_RATIO}."
    yield ""
    yield "| | median ms | tokens/s | against dense | median CPU ms | against dense |"
    yield "|---|---:|---:|---:|---:|---:|"
    for entrant in entrants:
        wall, cpu = statistics.median(entrant.seconds), statistics.median(entrant.cpu_seconds)
        ratio = median_ratio(entrants[0].seconds, entrant.seconds)
        cpu_ratio = median_ratio(entrants[0].cpu_seconds, entrant.cpu_seconds)
        speed = arguments.tokens / wall
        yield f"| {entrant.name} | {wall * 1e3:.0f} | {speed:.0f} | {ratio:.2f} | {cpu * 1e3:.0f} | {cpu_ratio:.2f} |"
    yield ""
    yield "Raw seconds, wall and processor:"
    yield ""
    yield "```json"
    for entrant in entrants:
        pairs = zip(entrant.seconds, entrant.cpu_seconds, strict=True)
        yield json.dumps({entrant.name: [[round(wall, 3), round(cpu, 3)] for wall, cpu in pairs]})
    yield "```"


if __name__ == "__main__":
    sys.exit(main())
