"""Quality on held-out text: perplexity of teacher and student, routing, load."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from factorctl.errors import FactorctlError
from factorctl.progress import Progress
from factorctl.training.batches import Batches
from factorctl.training.distiller import StepReport

PARTS = ("lm", "kd", "par", "mse", "balance", "z")


@dataclass(frozen=True)
class Heldout:
    """What was measured on the held-out text."""

    perplexity_dense: float
    perplexity: float
    agreement: float | None
    """Share of the teacher's labels that the routers chose; None where nothing is routed."""
    losses: dict[str, float]
    load: list[list[float]]
    """Share of the tokens that chose each expert, by layer; empty where nothing is routed."""


@torch.no_grad()
def measure(model: nn.Module, batches: Batches, accelerator: Any, progress: Progress, title: str) -> Heldout:
    """Run the held-out text through teacher and student. `model` is a `Distiller`, wrapped or not.

    Raises:
        FactorctlError: the student's loss is not finite.
    """
    shares = batches.heldout()
    sums: torch.Tensor | None = None
    load: torch.Tensor | None = None
    names: list[str] = []
    with progress.stage(title, total=len(shares), unit="batch") as task:
        for (ids_BL, positions_BL), counts in shares:
            report = model(ids_BL, positions_BL, measuring=True)
            names, values = _weighted_parts(report)
            values = values * counts
            sums = values if sums is None else sums + values
            if report.load_LN is not None:
                load = report.load_LN * counts if load is None else load + report.load_LN * counts
            task.advance()
    if sums is None:
        raise AssertionError("the held-out part is empty")
    total = accelerator.reduce(sums, reduction="sum").tolist()
    means = dict(zip(names, (value / total[-1] for value in total), strict=True))
    if not math.isfinite(means["lm"]):
        raise FactorctlError(
            f"{title.lower()}: the loss on the held-out text is not finite",
            "try --precision float32; if it is that already, ask `factorctl verify` whether the checkpoint is whole",
        )
    counted = torch.tensor([_tokens(shares)], dtype=torch.float64, device=sums.device)
    tokens = float(accelerator.reduce(counted, reduction="sum"))
    shares_LN = [] if load is None else (accelerator.reduce(load, reduction="sum") / tokens).tolist()
    return Heldout(
        perplexity_dense=_perplexity(means["teacher_lm"]),
        perplexity=_perplexity(means["lm"]),
        agreement=means.get("agreement"),
        losses={name: means[name] for name in PARTS if name in means},
        load=shares_LN,
    )


def _weighted_parts(report: StepReport) -> tuple[list[str], torch.Tensor]:
    """Names and values of all measured parts, times the tokens they are means over; last, those tokens."""
    names = [name for name in (*PARTS, "agreement", "teacher_lm") if getattr(report, name) is not None]
    values = [getattr(report, name).double() for name in names] + [torch.ones_like(report.total, dtype=torch.float64)]
    return [*names, "counted"], torch.stack(values) * report.counted


def _tokens(shares: list[tuple[tuple[torch.Tensor, torch.Tensor], bool]]) -> int:
    return sum(ids.numel() for (ids, _), counts in shares if counts)


def _perplexity(mean_loss: float) -> float:
    """exp of the mean loss, at most what a float holds."""
    return math.exp(min(mean_loss, 700.0))
