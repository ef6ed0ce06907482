"""How fast training is, and what it reaches on the demo model.

    python tests/benchmarks/bench_training.py throughput --threads 2
    python tests/benchmarks/bench_training.py row default-1R4E2K --data train.jsonl.xz --work runs/bench
    python tests/benchmarks/bench_training.py report --work runs/bench

`throughput` times one optimiser step of the factored model at K of N, interleaved with the same step of the dense
model in the same harness: plain dense fine-tuning of the same FFNs plus the dense teacher's forward pass.
`row` factorizes and finetunes one row of the demo table (`row --list` names them) and keeps its numbers in the work
directory; a row that was interrupted goes on where it stopped. `report` writes docs/benchmarks/<date>-training-<cpu>.md
from the rows that are there.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from factorctl.checkpoint.manifest import is_artefact
from factorctl.cli.render import progress_listener
from factorctl.config import FactorizeConfig, FinetuneConfig, factor_shape
from factorctl.models.building import empty_factored_model
from factorctl.models.factored_spec import FactoredSpec
from factorctl.models.families import dense_model
from factorctl.models.path_choice import processor_name
from factorctl.pipeline.factorize import factorize
from factorctl.pipeline.finetune import finetune
from factorctl.training.distiller import Distiller
from factorctl.training.optimizers import choose_trained, make_optimizers
from factorctl.training.presets import LossWeights, Recipe, recipe_of
from factorctl.training.teacher import own_tensors, teacher_ffn
from factorctl.training.twin_ffn import TwinFFN, TwinOptions

REPORTS = Path(__file__).parents[2] / "docs" / "benchmarks"
LIBRARIES = ("factorctl", "torch", "transformers", "accelerate")
BAR_RATIO = 0.6
LAYERS = 6
"""Decoder layers of the throughput model: the demo model's shapes, a fifth of its depth."""


@dataclass(frozen=True)
class Row:
    """One row of the demo table."""

    factorize: dict[str, Any]
    preset: str
    finetune: dict[str, Any] = field(default_factory=dict)
    base: str = ""
    """Rows with the same base share its factorization."""


PAPER: dict[str, Any] = {"strategy": "permuted", "router": "random", "gate": "hard", "scale": "paper"}
OURS: dict[str, Any] = {"strategy": "clustered", "router": "analytic", "refit": True}
ROWS: dict[str, Row] = {
    "factorllm-1R4E2K": Row({"num_experts": 4, "top_k": 2, **PAPER}, "factorllm", base="paper-4"),
    "default-1R4E2K": Row({"num_experts": 4, "top_k": 2, **OURS}, "default", base="ours-4"),
    "static-S768": Row({"num_experts": 4, "top_k": 0, "shared_fraction": 0.5, **OURS}, "default", base="static-768"),
    "default-1R8E3K-S384": Row(
        {"num_experts": 8, "top_k": 3, "shared_fraction": 0.25, **OURS}, "default", base="ours-8"
    ),
    "default-1R32E11K-S384": Row(
        {"num_experts": 32, "top_k": 11, "shared_fraction": 0.25, **OURS}, "default", base="ours-32"
    ),
    "static-S816": Row(
        {"num_experts": 8, "top_k": 0, "shared_fraction": 0.53125, **OURS}, "default", base="static-816"
    ),
    "factorllm-1R8E3K-S384": Row(
        {"num_experts": 8, "top_k": 3, "shared_fraction": 0.25, **PAPER}, "factorllm", base="paper-8"
    ),
    "factorllm-1R32E11K-S384": Row(
        {"num_experts": 32, "top_k": 11, "shared_fraction": 0.25, **PAPER}, "factorllm", base="paper-32"
    ),
}
"""Half of the FFN's neurons active, as near as equal experts allow; the controls have as many or more."""


def main() -> int:
    arguments = parse(sys.argv[1:])
    torch.set_num_threads(arguments.threads)
    if arguments.command == "throughput":
        return throughput(arguments)
    if arguments.command == "row":
        return run_row(arguments)
    return write_demo_report(arguments)


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    speed = commands.add_parser("throughput")
    speed.add_argument("--rounds", type=int, default=9)
    speed.add_argument("--tokens", type=int, default=1024, help="tokens of one step")
    speed.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    speed.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    row = commands.add_parser("row")
    row.add_argument("name", choices=list(ROWS))
    row.add_argument("--data", required=True, help="training text; the held-out text is taken from it")
    row.add_argument("--tokens", type=int, default=61_440)
    row.add_argument("--calibration-tokens", type=int, default=12_288)
    row.add_argument("--heldout-tokens", type=int, default=16_384)
    row.add_argument("--block-length", type=int, default=512)
    row.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto")
    row.add_argument("--model", default="demo")
    report = commands.add_parser("report")
    for command in (speed, row, report):
        command.add_argument("--threads", type=int, default=os.cpu_count() or 1)
        command.add_argument("--work", type=Path, default=Path("runs/bench-training"))
    return parser.parse_args(words)


# ---- throughput ------------------------------------------------------------------------------------------------


def demo_shapes() -> dict[str, Any]:
    """The demo model's configuration, less deep."""
    return {
        "model_type": "llama",
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }


def make_distiller(
    num_experts: int, top_k: int, shared: float, recipe: Recipe, dtype: torch.dtype, device: str
) -> Distiller:
    """Random weights: the time of a step does not depend on them, but for how evenly a random router spreads."""
    dense = dense_model(demo_shapes(), origin="benchmark")
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
    options = TwinOptions(recipe.weights, None, dtype)
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
    ours = recipe_of(FinetuneConfig(tokens=1))
    plain = replace(ours, weights=LossWeights(kd=1.0))
    sizes = {
        "dense + teacher forward": (4, 4, 0.0, plain),
        "1R4E2K": (4, 2, 0.0, ours),
        "1R8E3K+S384": (8, 3, 0.25, ours),
        "1R32E11K+S384": (32, 11, 0.25, ours),
    }
    made = []
    for name, (experts, top_k, shared, recipe) in sizes.items():
        distiller = make_distiller(experts, top_k, shared, recipe, dtype, arguments.device)
        made.append(Contender(name, distiller, make_optimizers(distiller, recipe)))
    return made


def throughput(arguments: argparse.Namespace) -> int:
    entrants = contenders(arguments)
    ids_BL = torch.randint(49_000, (1, arguments.tokens), generator=torch.Generator().manual_seed(0))
    ids_BL, positions_BL = ids_BL.to(arguments.device), torch.arange(arguments.tokens, device=arguments.device)[None]
    for round_ in range(arguments.rounds + 1):
        for entrant in entrants if round_ % 2 else reversed(entrants):
            seconds, cpu_seconds = entrant.step(ids_BL, positions_BL)
            if round_:  # the first is warm-up
                entrant.seconds.append(seconds)
                entrant.cpu_seconds.append(cpu_seconds)
    lines = list(throughput_lines(entrants, arguments))
    print("\n".join(lines))
    write_report("training-throughput", lines)
    ratios = [median_ratio(entrants[0].seconds, entrant.seconds) for entrant in entrants[1:]]
    return 0 if min(ratios) >= BAR_RATIO else 1


def median_ratio(dense: list[float], entrant: list[float]) -> float:
    """Tokens per second against dense: the median over rounds of the ratio of neighbours in time."""
    return statistics.median(d / e for d, e in zip(dense, entrant, strict=True))


def throughput_lines(entrants: list[Contender], arguments: argparse.Namespace) -> Iterator[str]:
    yield f"# Training throughput, {datetime.date.today()}"
    yield ""
    yield from machine_lines(arguments)
    yield ""
    yield f"{LAYERS} decoder layers of the demo model's shapes, one step of {arguments.tokens} tokens in "
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


# ---- the demo table --------------------------------------------------------------------------------------------


def run_row(arguments: argparse.Namespace) -> int:
    """Factorize (once per base) and finetune one row; its numbers go to <work>/<name>.json."""
    row, work, progress = ROWS[arguments.name], arguments.work, progress_listener(quiet=False)
    base, tuned = work / "bases" / row.base, work / arguments.name
    if not is_artefact(base):
        options = {"calibration": arguments.data, "calibration_tokens": arguments.calibration_tokens}
        factorize(FactorizeConfig(model=arguments.model, out=base, device="cpu", **options, **row.factorize), progress)
    config = FinetuneConfig(
        checkpoint=base,
        tokens=arguments.tokens,
        data=arguments.data,
        preset=row.preset,  # type: ignore[arg-type]
        batch_tokens=2048,
        block_length=arguments.block_length,
        heldout_tokens=arguments.heldout_tokens,
        precision=arguments.precision,
        out=tuned,
        overwrite=is_artefact(tuned),
        resume=(work / f"{arguments.name}.training" / "run.json").exists() and not is_artefact(tuned),
        device="cpu",
        **row.finetune,
    )
    if row.preset == "factorllm":
        config = replace(config, batch_tokens=None, block_length=1024)  # 1 x 1024 tokens, as published
    result = asdict(finetune(config, progress))
    shape = factor_shape(
        1536,
        num_experts=row.factorize["num_experts"],
        top_k=row.factorize["top_k"],
        shared_fraction=row.factorize.get("shared_fraction", 0.0),
    )
    curve = [json.loads(line) for line in Path(result["metrics"]).read_text().splitlines()]
    record = {
        "row": arguments.name,
        "active_neurons": shape.active_neurons,
        "command": shlex.join(["python", *sys.argv]),
        "machine": list(machine_lines(arguments)),
        "result": result,
        "curve": [{k: line.get(k) for k in ("tokens", "lm", "kd", "par", "agreement")} for line in curve],
    }
    (work / f"{arguments.name}.json").write_text(json.dumps(record, indent=1))
    print("\n".join(row_lines([record])))
    return 0


def row_lines(records: list[dict[str, Any]]) -> Iterator[str]:
    yield "| row | active of 1536 | dense | before | after | router agreement | tokens | tokens/s | minutes |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    for record in records:
        r = record["result"]
        agreement = "-" if r["router_agreement"] is None else f"{r['router_agreement']:.1%}"
        yield (
            f"| {record['row']} | {record['active_neurons']} | {r['perplexity_dense']:.1f} | "
            f"{r['perplexity_before']:.1f} | {r['perplexity_after']:.1f} | {agreement} | {r['tokens']:,} | "
            f"{r['tokens_per_second']:.0f} | {r['seconds'] / 60:.1f} |"
        )


def write_demo_report(arguments: argparse.Namespace) -> int:
    """All rows that were run, how far routing is from its static control, and the loss curves."""
    files = [arguments.work / f"{name}.json" for name in ROWS]
    records = [json.loads(file.read_text()) for file in files if file.exists()]
    lines = list(demo_lines(records))
    print("\n".join(lines))
    write_report("training-demo", lines)
    return 0 if len(records) == len(ROWS) else 1


def demo_lines(records: list[dict[str, Any]]) -> Iterator[str]:
    yield f"# Finetuning the demo model, {datetime.date.today()}"
    yield ""
    yield from records[0]["machine"]
    yield ""
    yield "Held-out perplexity (documents of the training text's sources that were kept from it). Static rows run only "
    yield "shared neurons, chosen by importance, and are trained with the same losses and tokens as `default`."
    yield ""
    yield from row_lines(records)
    yield ""
    after = {record["row"]: record["result"]["perplexity_after"] for record in records}
    for routed, static in (("1R4E2K", "S768"), ("1R8E3K-S384", "S816"), ("1R32E11K-S384", "S816")):
        ours, control = after.get(f"default-{routed}"), after.get(f"static-{static}")
        if ours and control:
            verdict = "routing wins by" if ours < control else "routing loses by"
            yield f"- default-{routed} against static-{static}: {verdict} {abs(control - ours) / control:.1%}"
    yield ""
    yield "## Commands"
    yield ""
    yield from (f"    {record['command']}" for record in records)
    yield ""
    yield "## Loss curves"
    yield ""
    yield "Means over a tenth of the run each, of the loss that is trained on (kd, else lm), then PAR, then agreement."
    yield ""
    for record in records:
        yield f"- {record['row']}: {curve_text(record['curve'])}"


def curve_text(curve: list[dict[str, Any]]) -> str:
    parts = []
    for name in ("kd", "lm", "par", "agreement"):
        values = [line[name] for line in curve if line.get(name) is not None]
        if values and not (name == "lm" and parts):
            size = max(1, len(values) // 10)
            means = [statistics.mean(values[i : i + size]) for i in range(0, len(values), size)]
            parts.append(f"{name} " + " ".join(f"{mean:.3g}" for mean in means))
    return "; ".join(parts)


# ---- both ------------------------------------------------------------------------------------------------------


def machine_lines(arguments: argparse.Namespace) -> Iterator[str]:
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    yield f"- {processor_name()}, {os.cpu_count()} cores, {arguments.threads} threads, load {os.getloadavg()[0]:.1f}"
    yield f"- Python {sys.version.split()[0]}, {versions}"


def write_report(kind: str, lines: Sequence[str]) -> None:
    name = re.sub(r"[^a-z0-9]+", "-", " ".join(processor_name().lower().split()[:2])).strip("-")
    REPORTS.mkdir(parents=True, exist_ok=True)
    path = REPORTS / f"{datetime.date.today()}-{kind}-{name}.md"
    path.write_text("\n".join(lines) + "\n")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    sys.exit(main())
