"""Routing against static pruning at equal active neurons, free of training and trained alike, many cells at a time.

    python tests/benchmarks/bench_routing.py run --data ../shared/data/lm --work /dev/shm/routing
    python tests/benchmarks/bench_routing.py run --plan plans/rates.toml --workers 8 --seconds 240 ...
    python tests/benchmarks/bench_routing.py report --work /dev/shm/routing

`run` does every cell of a plan (routing_cells.py) that the results do not hold yet, on a GPU several at a time, and
appends each result to <work>/cells.jsonl as it ends. `report` writes docs/benchmarks/<date>-routing-demo-<cpu>.md.
Excess is ln(perplexity / perplexity of the dense model) on text that no choice was made on.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from reporting import report_path, write_report
from routing_cells import Cell, Site, read_plan
from routing_crew import Crew, Job, Results, read_results
from routing_report import report_text

from factorctl.checkpoint.manifest import is_artefact
from factorctl.checkpoint.sources import resolve
from factorctl.files.cache import cache_directory
from factorctl.files.hashing import hash_value
from factorctl.files.strict_json import read_json_object
from factorctl.progress import SilentProgress

PLANS = Path(__file__).with_name("plans")
RESULTS_NAME = "cells.jsonl"
TASKS = ("piqa", "openbookqa", "arc_easy", "winogrande", "boolq")
WORKERS = {"cpu": 1, "cuda": 8}


def main() -> int:
    arguments = parse(sys.argv[1:])
    if arguments.command == "report":
        records = read_results(arguments.results or arguments.work / RESULTS_NAME)
        text = report_text(records)
        if arguments.out:
            arguments.out.write_text(text, encoding="utf-8")
        else:
            write_report(report_path("routing-demo"), text)
        return 0
    return run(arguments)


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("--plan", type=Path, default=PLANS / "table.toml", help="a TOML file of cells")
    runs.add_argument("--routed", default="routed", help="the strategy that `routed` stands for in a plan")
    runs.add_argument("--model", default="demo")
    runs.add_argument(
        "--data", type=Path, required=True, help="holds train-*.jsonl.xz, valid.jsonl.xz, select.jsonl.xz"
    )
    runs.add_argument("--train-files", type=int, default=1, help="training shards to use")
    runs.add_argument("--tasks", type=Path, help="directory of task files, for cells that ask for tasks")
    runs.add_argument("--task-limit", type=int)
    runs.add_argument("--task-batch", type=int, default=16, help="prompts at once; workers share the memory")
    runs.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    runs.add_argument("--workers", type=int, help="processes; 8 on a GPU, else 1")
    runs.add_argument("--seconds", type=float, help="begin no job after this long, end all a tenth later")
    runs.add_argument("--copy", type=Path, help="a second file for the results")
    runs.add_argument("--keep", default="", help="names of cells whose trained checkpoints stay, or `all`")
    for option, number in asdict(Site("", "", "", {})).items():
        if option.endswith("_tokens") or option == "block_length":
            runs.add_argument(f"--{option.replace('_', '-')}", type=int, default=number)
    report = commands.add_parser("report")
    report.add_argument("--results", type=Path)
    report.add_argument("--out", type=Path)
    for command in (runs, report):
        command.add_argument("--work", type=Path, default=Path("runs/bench-routing"))
    return parser.parse_args(words)


def run(arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    site = site_of(arguments)
    intermediate_size = int(read_json_object(Path(site.model, "config.json"))["intermediate_size"])
    plan = read_plan(arguments.plan, routed=arguments.routed)
    results = Results(arguments.work / RESULTS_NAME, arguments.copy)
    jobs = list(jobs_of(plan, site, intermediate_size, results.done(), arguments.keep))
    workers = min(arguments.workers or WORKERS[device_type(site.device)], max(1, len(jobs)))
    print(f"{len(plan)} cells, {len(jobs)} jobs to do, {workers} workers, model {site.model}", flush=True)
    left = None if arguments.seconds is None else max(1.0, arguments.seconds - (time.monotonic() - started))
    crew = Crew(site, jobs, results, workers, left)
    failed = crew.work()
    print(f"{crew.finished} jobs done, {failed} failed, {len(jobs) - crew.finished - failed} not begun", flush=True)
    return 1 if failed else 0


def device_type(device: str) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def site_of(arguments: argparse.Namespace) -> Site:
    arguments.work.mkdir(parents=True, exist_ok=True)
    source = resolve(arguments.model, revision=None, cache=cache_directory(), progress=SilentProgress())
    shards = sorted(arguments.data.glob("train-*.jsonl.xz"))[: arguments.train_files]
    workers = arguments.workers or WORKERS[device_type(arguments.device)]
    sizes = {name: getattr(arguments, name) for name in vars(arguments) if name.endswith("_tokens")}
    return Site(
        model=str(source.path),
        work=str(arguments.work.resolve()),
        train=",".join(str(shard.resolve()) for shard in shards),
        texts={name: str((arguments.data / f"{name}.jsonl.xz").resolve()) for name in ("valid", "select")},
        tasks=str(arguments.tasks) if arguments.tasks else None,
        task_names=TASKS,
        task_limit=arguments.task_limit,
        task_batch=arguments.task_batch,
        device=arguments.device,
        threads=max(1, len(os.sched_getaffinity(0)) // workers),
        block_length=arguments.block_length,
        **sizes,
    )


def jobs_of(cells: list[Cell], site: Site, intermediate_size: int, done: set[str], keep: str) -> Iterator[Job]:
    """What is still to be done, each cell behind its base, bases first needed first."""
    begun: set[str] = set()
    for text in dict.fromkeys(cell.text for cell in cells):
        if f"dense/{text}" not in done:
            yield Job(f"dense/{text}", {"kind": "dense", "text": text}, facts={"text": text})
    for cell in cells:
        if cell.name in done:
            continue
        options = cell.factorize_options(intermediate_size)
        base = f"base/{hash_value(options)[:12]}"
        out = site.home / "bases" / base.partition("/")[2]
        if base not in begun and not is_artefact(out):
            begun.add(base)
            yield Job(base, {"kind": "base", "options": options, "out": str(out)}, facts={"options": options})
        shape = cell.shape(intermediate_size)
        request = {
            "kind": "cell",
            "cell": cell.record(),
            "base": str(out),
            "directory": re.sub(r"[^A-Za-z0-9._=-]+", "_", cell.name)[:150],
            "keep": keep == "all" or cell.name in keep.split(),
        }
        facts = {"cell": cell.record(), "active": shape.active_neurons, "neurons": intermediate_size,
                 "notation": shape.notation}  # fmt: skip
        yield Job(cell.name, request, needs=base if base in begun else None, facts=facts)


if __name__ == "__main__":
    sys.exit(main())
