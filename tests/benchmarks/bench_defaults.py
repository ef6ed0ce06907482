"""What the options of `factorize` are worth on the demo model, one changed at a time: what its defaults rest on.

    python tests/benchmarks/bench_defaults.py case shape-8-shared --data valid.jsonl.xz --calibration train.jsonl.xz
    python tests/benchmarks/bench_defaults.py report

`case` factorizes and measures the perplexity of held-out text, and keeps both in the work directory. `report` writes
docs/benchmarks/<date>-defaults-demo-<cpu>.md from the cases that are there. No gradient is taken.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bench_eval import share_dense_parts
from reporting import header, report_path, write_report

from factorctl.checkpoint.manifest import is_artefact
from factorctl.cli.render import progress_listener
from factorctl.config.evaluate import EvalConfig
from factorctl.config.factorize import FactorizeConfig
from factorctl.config.shape import factor_shape
from factorctl.pipeline.evaluate.run import evaluate
from factorctl.pipeline.factorize.run import factorize

DEMO_NEURONS = 1536
BARE: dict[str, Any] = {"num_experts": 4, "top_k": 2}
"""`factorctl factorize demo --experts 4`, as shipped: the paper's shape, no value changed."""
SHARED: dict[str, Any] = {"num_experts": 8, "top_k": 3, "shared_fraction": 0.25, "refit": True}
"""A quarter of the neurons shared, down-projections refitted: about as many active neurons."""


@dataclass(frozen=True)
class Case:
    """One factorization: a base, and what differs from it."""

    base: dict[str, Any]
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        return {**self.base, **self.changes}

    @property
    def active_neurons(self) -> int:
        sizes = {name: self.options.get(name, 0.0) for name in ("num_experts", "top_k", "shared_fraction")}
        return factor_shape(DEMO_NEURONS, **sizes).active_neurons

    @property
    def flags(self) -> str:
        """The options of the command line that differ from the shipped ones."""
        names = {"num_experts": "experts"}
        words = []
        for key, value in self.options.items():
            flag = f"--{names.get(key, key).replace('_', '-')}"
            if value is not False:
                words += [flag] if value is True else [flag, str(value)]
        return " ".join(words)


def one_by_one(prefix: str, base: dict[str, Any], changes: dict[str, dict[str, Any]]) -> dict[str, Case]:
    """The base itself and each of its changes."""
    return {prefix: Case(base)} | {f"{prefix}-{name}": Case(base, changed) for name, changed in changes.items()}


OPTIONS: dict[str, dict[str, Any]] = {
    "clustered": {"strategy": "clustered"},
    "contiguous": {"strategy": "contiguous"},
    "permuted": {"strategy": "permuted"},
    "random-router": {"router": "random"},
    "hard-gate": {"gate": "hard"},
    "fitted-scale": {"scale": "fitted"},
    "paper-scale": {"scale": "paper"},
}
CASES: dict[str, Case] = {
    **one_by_one("bare", BARE, OPTIONS | {"refit": {"refit": True}}),
    **one_by_one(
        "shared",
        SHARED,
        OPTIONS
        | {
            "no-refit": {"refit": False},
            "no-refit-fitted-scale": {"refit": False, "scale": "fitted"},
            "none-shared": {"top_k": 4, "shared_fraction": 0.0},
            "32-experts": {"num_experts": 32, "top_k": 11},
            "4-experts": {"num_experts": 4, "top_k": 1},
        },
    ),
}


def main() -> int:
    arguments = parse(sys.argv[1:])
    torch.set_num_threads(arguments.threads)
    if arguments.command == "report":
        return write_defaults_report(arguments.work)
    for name in arguments.names:
        run_case(name, arguments)
    return 0


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    case = commands.add_parser("case")
    case.add_argument("names", nargs="+", choices=list(CASES), metavar="NAME", help=", ".join(CASES))
    case.add_argument("--data", required=True, help="held-out text")
    case.add_argument("--data-tokens", type=int, default=16_384)
    case.add_argument("--calibration", required=True)
    case.add_argument("--calibration-tokens", type=int, default=12_288)
    report = commands.add_parser("report")
    for command in (case, report):
        command.add_argument("--threads", type=int, default=os.cpu_count() or 1)
        command.add_argument("--work", type=Path, default=Path("runs/bench-defaults"))
    return parser.parse_args(words)


def run_case(name: str, arguments: argparse.Namespace) -> None:
    """Factorize and measure one case, unless that was done; its numbers go to <work>/<name>.json."""
    case, work, progress = CASES[name], arguments.work, progress_listener(quiet=False)
    record = work / f"{name}.json"
    if record.exists():
        return
    checkpoint, evaluation = work / name, work / f"{name}-eval"
    if not is_artefact(checkpoint):
        calibration = {"calibration": arguments.calibration, "calibration_tokens": arguments.calibration_tokens}
        factorize(FactorizeConfig(model="demo", out=checkpoint, device="cpu", **calibration, **case.options), progress)
    for done in sorted(work.glob("*-eval")):
        share_dense_parts(done, evaluation)
    config = EvalConfig(
        checkpoint=str(checkpoint),
        data=(arguments.data,),
        data_tokens=arguments.data_tokens,
        document_tokens=512,
        fidelity=False,
        dtype="bfloat16",
        resume=True,
        out=evaluation,
        device="cpu",
    )
    (text,) = evaluate(config, progress).perplexity.values()
    found = {
        "dense": text.dense,
        "model": text.model,
        "ci": text.ci,
        "tokens": text.tokens,
        "documents": text.documents,
    }
    record.write_text(json.dumps({"command": shlex.join(["python", *sys.argv]), **found}, indent=1))
    shutil.rmtree(checkpoint)  # half a gigabyte each


def write_defaults_report(work: Path) -> int:
    """One table per base."""
    records = {name: json.loads(file.read_text()) for name in CASES if (file := work / f"{name}.json").exists()}
    text = header("What the options of factorize are worth") + "\n".join(["", *report_lines(records), ""])
    write_report(report_path("defaults-demo"), text)
    return 0 if len(records) == len(CASES) else 1


def report_lines(records: dict[str, dict[str, Any]]) -> Iterator[str]:
    first = next(iter(records.values()))
    yield f"Perplexity of {first['tokens']:,} tokens of held-out text in {first['documents']} documents, with 95% "
    yield f"intervals over documents; dense {first['dense']:.1f}. Every case is calibrated on the same other text."
    yield ""
    for base in ("bare", "shared"):
        yield f"## {base}: `factorctl factorize demo {CASES[base].flags}`"
        yield ""
        yield f"| case | options | active of {DEMO_NEURONS} | perplexity |"
        yield "|---|---|---:|---:|"
        for name, record in records.items():
            if name.partition("-")[0] == base:
                case, (low, high) = CASES[name], record["ci"]
                measured = f"{record['model']:.1f} [{low:.1f}, {high:.1f}]"
                yield f"| {name} | `{case.flags}` | {case.active_neurons} | {measured} |"
        yield ""


if __name__ == "__main__":
    raise SystemExit(main())
