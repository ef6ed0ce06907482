"""Benchmark accuracy through lm-eval: its prompts, metrics and evaluator, on a model in memory, offline where asked."""

from factorctl.evaluation.tasks.comparison import AverageKept, TaskComparison, average_kept, compare_scores
from factorctl.evaluation.tasks.plans import TaskPlan, resolve_tasks
from factorctl.evaluation.tasks.samples import read_samples, write_samples
from factorctl.evaluation.tasks.schemas import PAPER_TASKS
from factorctl.evaluation.tasks.scores import DocumentAnswer, TaskScores
from factorctl.evaluation.tasks.scoring import score_tasks

__all__ = [
    "PAPER_TASKS",
    "AverageKept",
    "DocumentAnswer",
    "TaskComparison",
    "TaskPlan",
    "TaskScores",
    "average_kept",
    "compare_scores",
    "read_samples",
    "resolve_tasks",
    "score_tasks",
    "write_samples",
]
