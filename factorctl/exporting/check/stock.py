"""Asking stock transformers, in a process that cannot import factorctl, what an export computes.

Routed experts in few bits are beyond stock transformers: of those alone a process that imports factorctl is asked.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from factorctl.errors import FactorctlError
from factorctl.exporting.check import stock_process
from factorctl.exporting.check.native import Question
from factorctl.quiet import QUIET_ENVIRONMENT


@dataclass(frozen=True)
class StockJob:
    """One directory to load and what to compute with it."""

    directory: Path
    dtype: str
    """What to compute in: stored weights are cast to it."""
    question: Question
    active_experts: int | None = None
    """Another number than config.json says."""
    by_layer: bool = False
    """Whether one decoder layer is in memory at a time, instead of the whole model."""
    prompts: Sequence[Sequence[int]] = ()
    """Token ids that are continued greedily."""
    new_tokens: int = 0


@dataclass(frozen=True)
class StockAnswer:
    """What stock transformers made of a directory."""

    class_name: str
    logits: list[torch.Tensor]
    """Per sequence [tokens, vocabulary]."""
    memory_bytes: int
    router_logits: list[torch.Tensor] = field(default_factory=list)
    """Of each layer with a router, [tokens of all sequences, experts]."""
    continuations: list[list[int]] = field(default_factory=list)


class StockReloadError(FactorctlError):
    """Stock transformers did not load the export, or not all of it: nothing may be published."""


def ask_stock(jobs: Sequence[StockJob]) -> list[StockAnswer]:
    """Load every directory with transformers' `AutoModelForCausalLM` in one blocked process.

    Raises:
        StockReloadError: loading failed, or a tensor was missing, unexpected or misshaped.
    """
    program = ["-I", str(Path(stock_process.__file__).resolve())]
    return _ask(jobs, program, "stock transformers")


def ask_quantised(jobs: Sequence[StockJob]) -> list[StockAnswer]:
    """Load every directory with what `factorctl.load` uses for quantised experts, in a process of its own.

    Raises:
        StockReloadError: loading failed, or a tensor was missing, unexpected or misshaped.
    """
    return _ask(jobs, ["-m", "factorctl.exporting.check.quantised_process"], "factorctl.load")


def _ask(jobs: Sequence[StockJob], program: Sequence[str], loader: str) -> list[StockAnswer]:
    with tempfile.TemporaryDirectory(prefix="factorctl-export-") as scratch:
        requests = [_request(job, Path(scratch) / f"{index}.safetensors") for index, job in enumerate(jobs)]
        request = Path(scratch) / "request.json"
        request.write_text(json.dumps({"jobs": requests}))
        replies = _run([*program, str(request)], loader)
        return [_answer(job, reply, made["answers"]) for job, reply, made in zip(jobs, replies, requests, strict=True)]


def _request(job: StockJob, answers: Path) -> dict[str, Any]:
    return {
        "directory": str(job.directory.resolve()),
        "dtype": job.dtype,
        "sequences": [list(ids) for ids in job.question.sequences],
        "positions": [list(places) for places in job.question.positions],
        "num_experts_per_tok": job.active_experts,
        "by_layer": job.by_layer,
        "prompts": [list(ids) for ids in job.prompts],
        "new_tokens": job.new_tokens,
        "answers": str(answers),
    }


def _run(program: Sequence[str], loader: str) -> list[dict[str, Any]]:
    finished = subprocess.run(
        [sys.executable, *program],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **QUIET_ENVIRONMENT, "HF_HUB_OFFLINE": "1"},
    )
    if finished.returncode:
        lines = finished.stderr.strip().splitlines() or [f"exit code {finished.returncode}"]
        raise StockReloadError(f"{loader} cannot load the export: {lines[-1]}", _REPORT)
    return [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{")]


def _answer(job: StockJob, reply: dict[str, Any], answers: str) -> StockAnswer:
    for kind, names in reply["loading"].items():
        raise StockReloadError(
            f"stock transformers ({reply['class']}) reports {kind} for {job.directory.name}: {names[0]} "
            f"({len(names)} in all)",
            _REPORT,
        )
    tensors = load_file(answers)
    return StockAnswer(
        reply["class"],
        _in_order(tensors, "logits."),
        reply["memory_bytes"],
        _in_order(tensors, "router."),
        reply["continuations"],
    )


def _in_order(tensors: Mapping[str, torch.Tensor], prefix: str) -> list[torch.Tensor]:
    names = [name for name in tensors if name.startswith(prefix)]
    return [tensors[name] for name in sorted(names, key=lambda name: int(name.removeprefix(prefix)))]


_REPORT = "nothing was published; this is a fault of factorctl: please report it with the output of `factorctl inspect`"
