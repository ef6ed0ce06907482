"""What finetuning the demo model reaches, beside the paper's recipe and static pruning.

    python tests/benchmarks/bench_training.py row default-1R4E2K --data train.jsonl.xz --work runs/bench
    python tests/benchmarks/bench_training.py report --work runs/bench

`row` factorizes and finetunes one row and keeps its numbers in the work directory; a row that was interrupted goes on
where it stopped. `report` writes docs/benchmarks/<date>-training-demo-<cpu>.md from the rows that are there: the demo
table, and the trials that the `default` preset's numbers were chosen by.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from reporting import header, report_path, write_report

from factorctl.checkpoint.manifest import is_artefact
from factorctl.cli.render import progress_listener
from factorctl.config.factorize import FactorizeConfig
from factorctl.config.finetune import FinetuneConfig, PresetName
from factorctl.config.shape import factor_shape
from factorctl.pipeline.factorize.run import factorize
from factorctl.pipeline.finetune.run import finetune

TABLE_TOKENS, TRIAL_TOKENS = 61_440, 16_384


@dataclass(frozen=True)
class Row:
    """One finetuning run of the demo model."""

    factorize: dict[str, Any]
    preset: PresetName
    finetune: dict[str, Any] = field(default_factory=dict)
    """What is not the preset's."""
    base: str = ""
    """Rows with the same base share its factorization."""
    tokens: int = TABLE_TOKENS


PAPER: dict[str, Any] = {"strategy": "permuted", "router": "random", "gate": "hard", "scale": "paper"}
OURS: dict[str, Any] = {"strategy": "clustered", "router": "analytic", "refit": True}
COARSE: dict[str, Any] = {"num_experts": 4, "top_k": 2}
MEDIUM: dict[str, Any] = {"num_experts": 8, "top_k": 3, "shared_fraction": 0.25}
FINE: dict[str, Any] = {"num_experts": 32, "top_k": 11, "shared_fraction": 0.25}
STATIC_768: dict[str, Any] = {"num_experts": 4, "top_k": 0, "shared_fraction": 0.5}
STATIC_816: dict[str, Any] = {"num_experts": 8, "top_k": 0, "shared_fraction": 0.53125}
TABLE: dict[str, Row] = {
    "factorllm-1R4E2K": Row({**COARSE, **PAPER}, "factorllm", base="paper-4"),
    "default-1R4E2K": Row({**COARSE, **OURS}, "default", base="ours-4"),
    "static-S768": Row({**STATIC_768, **OURS}, "default", base="static-768"),
    "factorllm-1R8E3K-S384": Row({**MEDIUM, **PAPER}, "factorllm", base="paper-8"),
    "default-1R8E3K-S384": Row({**MEDIUM, **OURS}, "default", base="ours-8"),
    "factorllm-1R32E11K-S384": Row({**FINE, **PAPER}, "factorllm", base="paper-32"),
    "default-1R32E11K-S384": Row({**FINE, **OURS}, "default", base="ours-32"),
    "static-S816": Row({**STATIC_816, **OURS}, "default", base="static-816"),
}
"""Half of the FFN's neurons active, as near as equal experts allow; the controls have as many."""


def trial(**changes: Any) -> Row:
    """A short run of the `default` preset with other numbers."""
    return Row({**MEDIUM, **OURS}, "default", changes, base="ours-8", tokens=TRIAL_TOKENS)


TRIALS: dict[str, Row] = {
    "trial-par-0.1": trial(loss_weights={"par": 0.1}),
    "trial-par-0.1-lr-5e-4-batch-512": trial(loss_weights={"par": 0.1}, lr=5e-4, batch_tokens=512),
    "trial-par-5": trial(loss_weights={"par": 5.0}),
    "trial-par-5-balance-0.5": trial(loss_weights={"par": 5.0, "balance": 0.5}),
}
ROWS = TABLE | TRIALS


def main() -> int:
    arguments = parse(sys.argv[1:])
    torch.set_num_threads(arguments.threads)
    return run_row(arguments) if arguments.command == "row" else write_demo_report(arguments)


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    row = commands.add_parser("row")
    row.add_argument("name", choices=list(ROWS))
    row.add_argument("--data", required=True, help="training text; the held-out text is taken from it")
    row.add_argument("--tokens", type=int, help="other than the row's own number")
    row.add_argument("--calibration-tokens", type=int, default=12_288)
    row.add_argument("--heldout-tokens", type=int, default=8192)
    row.add_argument("--block-length", type=int, default=512)
    row.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto")
    row.add_argument("--model", default="demo")
    report = commands.add_parser("report")
    for command in (row, report):
        command.add_argument("--threads", type=int, default=os.cpu_count() or 1)
        command.add_argument("--work", type=Path, default=Path("runs/bench-training"))
    return parser.parse_args(words)


def run_row(arguments: argparse.Namespace) -> int:
    """Factorize (once per base) and finetune one row; its numbers go to <work>/<name>.json."""
    row, work, progress = ROWS[arguments.name], arguments.work, progress_listener(quiet=False)
    base, tuned = work / "bases" / row.base, work / arguments.name
    if not is_artefact(base):
        options = {"calibration": arguments.data, "calibration_tokens": arguments.calibration_tokens}
        factorize(FactorizeConfig(model=arguments.model, out=base, device="cpu", **options, **row.factorize), progress)
    config = FinetuneConfig(
        checkpoint=base,
        tokens=arguments.tokens or row.tokens,
        data=arguments.data,
        preset=row.preset,
        block_length=arguments.block_length,
        heldout_tokens=arguments.heldout_tokens,
        precision=arguments.precision,
        out=tuned,
        overwrite=is_artefact(tuned),
        resume=(work / f"{arguments.name}.training" / "run.json").exists() and not is_artefact(tuned),
        device="cpu",
    )
    if row.preset == "factorllm":
        config = replace(config, block_length=1024)  # one sequence of 1024 tokens a step, as published
    result = asdict(finetune(replace(config, **row.finetune), progress))
    sizes = {name: row.factorize.get(name, 0.0) for name in ("num_experts", "top_k", "shared_fraction")}
    curve = [json.loads(line) for line in Path(result["metrics"]).read_text().splitlines()]
    record = {
        "row": arguments.name,
        "active_neurons": factor_shape(1536, **sizes).active_neurons,
        "command": shlex.join(["python", *sys.argv]),
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
    """All rows that were run, how far routing is from its static control, trials, commands and loss curves."""
    records = {
        name: json.loads(file.read_text()) for name in ROWS if (file := arguments.work / f"{name}.json").exists()
    }
    text = header("Finetuning the demo model") + "\n".join(["", *report_lines(records), ""])
    write_report(report_path("training-demo"), text)
    return 0 if len(records) == len(ROWS) else 1


def report_lines(records: dict[str, dict[str, Any]]) -> Iterator[str]:
    yield "Held-out perplexity (documents of the training text's sources that were kept from it). Static rows run only "
    yield "shared neurons, chosen by importance, and are trained with the same losses and tokens as `default`."
    yield ""
    yield from row_lines([record for name, record in records.items() if name in TABLE])
    yield ""
    after = {name: record["result"]["perplexity_after"] for name, record in records.items()}
    for routed, static in (("1R4E2K", "S768"), ("1R8E3K-S384", "S816"), ("1R32E11K-S384", "S816")):
        ours, control = after.get(f"default-{routed}"), after.get(f"static-{static}")
        if ours and control:
            verdict = "routing wins by" if ours < control else "routing loses by"
            yield f"- default-{routed} against static-{static}: {verdict} {abs(control - ours) / control:.1%}"
    yield ""
    yield "## What the `default` preset's numbers were chosen by"
    yield ""
    yield from row_lines([record for name, record in records.items() if name in TRIALS])
    yield ""
    yield "## Commands"
    yield ""
    yield from (f"    {record['command']}" for record in records.values())
    yield ""
    yield "## Loss curves"
    yield ""
    yield "Means over a tenth of the run each, of the loss that is trained on (kd, else lm), then PAR, then agreement."
    yield ""
    for record in records.values():
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


if __name__ == "__main__":
    sys.exit(main())
