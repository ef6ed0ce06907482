"""A model against the dense one on the same documents: paired difference, exact test, and how much was kept."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from scipy.stats import binomtest

from factorctl.errors import UsageError
from factorctl.evaluation.tasks.scores import TaskScores, standard_error

CLEARLY = 2.0
"""Standard errors by which the dense model must be above chance before a share of that is worth a number."""


@dataclass(frozen=True)
class TaskComparison:
    """One task: the model's score beside the dense model's."""

    name: str
    metric: str
    n: int
    model: float
    dense: float
    stderr_diff: float
    """Standard error of model - dense, from the differences document by document."""
    p_value: float
    """Exact McNemar: how often `wins` and `losses` would be this unequal if each were as likely."""
    wins: int
    """Documents that the model has right and the dense model wrong."""
    losses: int
    chance: float | None
    majority: float | None
    dense_stderr: float
    kept: float | None
    """model / dense: the paper's relative maintenance."""
    kept_above_chance: float | None
    """(model - chance) / (dense - chance)."""
    why_not_kept: str | None
    """Why `kept_above_chance` is None."""

    @property
    def difference(self) -> float:
        return self.model - self.dense

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"difference": self.difference}


@dataclass(frozen=True)
class AverageKept:
    """Over tasks, each counting the same."""

    tasks: int
    model: float
    """Mean score."""
    dense: float
    kept: float | None
    """Ratio of the mean scores."""
    kept_above_chance: float | None
    """Ratio of the mean distances from chance, over the tasks whose chance is known."""
    why_not_kept: str | None


def compare_scores(model: TaskScores, dense: TaskScores) -> TaskComparison:
    """Pair two models' answers to the same prompts.

    Raises:
        UsageError: other tasks, metrics, documents or prompts.
    """
    _check_same(model, dense)
    differences = [ours.score - theirs.score for ours, theirs in zip(model.documents, dense.documents, strict=True)]
    wins, losses = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    above, why_not = _above_chance([model.value], [dense.value], [dense.chance], [dense.stderr])
    return TaskComparison(
        name=dense.name,
        metric=dense.metric,
        n=dense.n,
        model=model.value,
        dense=dense.value,
        stderr_diff=standard_error(differences),
        p_value=binomtest(wins, wins + losses).pvalue if wins + losses else 1.0,
        wins=wins,
        losses=losses,
        chance=dense.chance,
        majority=dense.majority,
        dense_stderr=dense.stderr,
        kept=_ratio(model.value, dense.value),
        kept_above_chance=above,
        why_not_kept=why_not,
    )


def average_kept(comparisons: Iterable[TaskComparison]) -> AverageKept:
    """The averages over tasks. A task at chance weighs little in the ratio of sums, and cannot blow it up.

    Raises:
        UsageError: there is no task.
    """
    tasks = list(comparisons)
    if not tasks:
        raise UsageError("no task was scored, so there is no average")
    above, why_not = _above_chance(
        [task.model for task in tasks],
        [task.dense for task in tasks],
        [task.chance for task in tasks],
        [task.dense_stderr for task in tasks],
    )
    model = statistics.fmean(task.model for task in tasks)
    dense = statistics.fmean(task.dense for task in tasks)
    return AverageKept(len(tasks), model, dense, _ratio(model, dense), above, why_not)


def _above_chance(
    model: list[float], dense: list[float], chance: list[float | None], stderr: list[float]
) -> tuple[float | None, str | None]:
    """sum(model - chance) / sum(dense - chance), or why there is no such number."""
    known = [(m, d, c, e) for m, d, c, e in zip(model, dense, chance, stderr, strict=True) if c is not None]
    if not known:
        return None, "chance is unknown where text is generated"
    excess = sum(d - c for _, d, c, _ in known)
    error = math.sqrt(sum(e**2 for *_, e in known))
    if excess <= CLEARLY * error:
        count = len(known)
        return None, (
            f"the dense model is {excess / count:+.3f} from chance with a standard error of {error / count:.3f}: "
            "not clearly above it"
        )
    return sum(m - c for m, _, c, _ in known) / excess, None


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def _check_same(model: TaskScores, dense: TaskScores) -> None:
    for what in ("name", "metric", "few_shot"):
        ours, theirs = getattr(model, what), getattr(dense, what)
        if ours != theirs:
            raise UsageError(
                f"two runs of {dense.name} cannot be compared: {what} is {ours} in one, {theirs} in the other"
            )
    if model.n != dense.n:
        raise UsageError(
            f"two runs of {dense.name} cannot be compared: one has {model.n} documents, the other {dense.n}",
            "run both with the same --limit and --task-data",
        )
    for ours, theirs in zip(model.documents, dense.documents, strict=True):
        if (ours.task, ours.doc_id, ours.doc_hash) != (theirs.task, theirs.doc_id, theirs.doc_hash):
            raise UsageError(
                f"two runs of {dense.name} cannot be compared: document {theirs.doc_id} of {theirs.task} differs",
                "run both on the same --task-data",
            )
        if ours.prompt_hash != theirs.prompt_hash:
            raise UsageError(
                f"two runs of {dense.name} cannot be compared: the prompts of document {theirs.doc_id} differ",
                "run both with the same --few-shot and --seed",
            )
