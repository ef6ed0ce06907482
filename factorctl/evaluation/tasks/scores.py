"""What one model answered on one task: every document, and the score that they add up to."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class DocumentAnswer:
    """One document: what was right, what the model said, and whether that counts."""

    task: str
    """lm-eval's name: the task, or its subject's in MMLU."""
    doc_id: int
    """Position among the task's documents, from 0."""
    doc_hash: str
    prompt_hash: str
    """lm-eval's hashes of the document and of its (first) prompt, few-shot examples included."""
    target: int | list[int] | str
    """Index of the right choice, or the reference text of a generated answer."""
    loglikelihoods: list[float]
    """Of each choice, in nats; empty where text is generated."""
    outputs: list[str]
    """The generated text; empty for multiple choice."""
    acc: float | None
    acc_norm: float | None
    score: float
    """The primary metric's."""

    @property
    def chance(self) -> float | None:
        """What blind guessing among the choices scores."""
        right = len(self.target) if isinstance(self.target, list) else 1
        return right / len(self.loglikelihoods) if self.loglikelihoods else None


@dataclass(frozen=True)
class TaskScores:
    """One model on one task."""

    name: str
    metric: str
    few_shot: int
    limit: int | None
    seed: int
    batch_size: int
    """Prompts at once: the smallest that was needed."""
    data: str
    fingerprint: str
    """`TaskPlan.fingerprint`: the same documents and definition."""
    versions: Mapping[str, str]
    documents: Sequence[DocumentAnswer] = field(repr=False)

    @property
    def n(self) -> int:
        return len(self.documents)

    @property
    def value(self) -> float:
        """Mean over documents; for MMLU that is the mean over subjects weighted by their size, as lm-eval has it."""
        return statistics.fmean(answer.score for answer in self.documents)

    @property
    def stderr(self) -> float:
        """Standard error of `value`; 0 for a single document."""
        return standard_error([answer.score for answer in self.documents])

    @property
    def chance(self) -> float | None:
        """Mean over documents of 1 / number of choices; None where text is generated."""
        shares = [answer.chance for answer in self.documents]
        return None if None in shares else statistics.fmean(share for share in shares if share is not None)

    @property
    def majority(self) -> float | None:
        """What always giving the most frequent answer scores; None where text is generated."""
        if self.chance is None:
            return None
        targets = Counter(
            choice
            for answer in self.documents
            for choice in (answer.target if isinstance(answer.target, list) else [answer.target])
        )
        return max(targets.values()) / self.n

    def summary(self) -> dict[str, Any]:
        """Everything but the documents, as JSON values."""
        stored = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "documents"}
        derived = {"n": self.n, "value": self.value, "stderr": self.stderr}
        return stored | derived | {"versions": dict(self.versions), "chance": self.chance, "majority": self.majority}


def standard_error(values: Sequence[float]) -> float:
    """Sample standard deviation over sqrt(n); 0 for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
