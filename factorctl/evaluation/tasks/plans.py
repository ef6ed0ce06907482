"""What `--tasks` names: plans with the data loaded and checked, before any model is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import lm_eval
from lm_eval.api.metrics import mean

from factorctl.errors import UsageError
from factorctl.evaluation.tasks.definitions import Tasks, local_tasks, mmlu_subjects
from factorctl.evaluation.tasks.hub_tasks import hub_tasks
from factorctl.evaluation.tasks.local_files import LocalTaskData, examples_name, read_task_data
from factorctl.evaluation.tasks.schemas import PAPER_TASKS, SCHEMAS, mmlu_schema
from factorctl.files.hashing import hash_value
from factorctl.progress import Progress, SilentProgress

PREFERRED_METRICS = ("acc_norm", "acc", "exact_match")
"""The primary metric is the first of these that lm-eval's definition has."""


@dataclass(frozen=True)
class TaskPlan:
    """One task to score: lm-eval's Task objects (57 for MMLU, one for most) with their documents."""

    name: str
    metric: str
    """The primary metric, a mean over documents of scores between 0 and 1."""
    filter: str
    """lm-eval's name of the answer extraction that the metric uses; 'none' for multiple choice."""
    default_few_shot: int
    always_zero_shot: bool
    """The definition itself says zero examples; lm-eval then allows no other number."""
    most_few_shot: int
    """Examples at hand per document."""
    documents: int
    data: str
    """Where the documents come from."""
    data_hash: str
    """sha256 of the local files' bytes, or of the documents as they came from the Hub."""
    versions: Mapping[str, str]
    notes: tuple[str, ...]
    tasks: Mapping[str, Any]

    @property
    def metric_name(self) -> str:
        """The metric as lm-eval writes it: with its filter, where that is one of several."""
        return self.metric if self.filter == "none" else f"{self.metric},{self.filter}"

    @property
    def fingerprint(self) -> str:
        """Equal fingerprints mean the same documents under the same definition of the same lm-eval."""
        return hash_value([self.name, self.metric, self.filter, self.data_hash, dict(self.versions)])

    def few_shot(self, asked: int | None) -> int:
        """The number of examples in each prompt when `asked` (None: the task's default) is asked for.

        Raises:
            UsageError: negative, or more than the data at hand holds.
        """
        count = self.default_few_shot if asked is None or self.always_zero_shot else asked
        if count < 0:
            raise UsageError(f"--few-shot {count} is negative", "give 0 or more")
        if count > self.most_few_shot:
            raise UsageError(
                f"{self.name} has {self.most_few_shot} few-shot examples at hand; --few-shot asks for {count}",
                f"add examples as {examples_name(self.name)}.jsonl to --task-data, or ask for fewer"
                if self.name in PAPER_TASKS
                else "ask for fewer",
            )
        return count


def resolve_tasks(
    names: Sequence[str], *, task_data: Path | None, few_shot: int | None = None, progress: Progress | None = None
) -> list[TaskPlan]:
    """The plans that `names` stand for, in their order, each once; 'paper' stands for the paper's eight.

    Args:
        task_data: directory with TASK.jsonl files; the eight are then read from there, any other task from the Hub.
        few_shot: checked against the examples at hand.

    Raises:
        UsageError: no or an unknown name, a missing file, a bad row, too few examples.
        IntegrityError: a file is damaged.
        ResourceError: the Hub cannot be reached.
    """
    progress = progress or SilentProgress()
    wanted = list(dict.fromkeys(name for given in names for name in (PAPER_TASKS if given == "paper" else (given,))))
    if not wanted:
        raise UsageError("no task is named", f"'paper' stands for {', '.join(PAPER_TASKS)}")
    local: dict[str, LocalTaskData] = {}
    if task_data is not None and (named := [name for name in wanted if name in SCHEMAS]):
        schemas = dict(SCHEMAS) | ({"mmlu": mmlu_schema(mmlu_subjects())} if "mmlu" in named else {})
        local = {data.name: data for data in read_task_data(task_data, named, schemas)}
    plans: list[TaskPlan] = []
    for name in wanted:
        plans += [_local_plan(local[name])] if name in local else _hub_plans(name, progress)
    return list({plan.name: _noting_few_shot(plan, few_shot) for plan in plans}.values())


def _noting_few_shot(plan: TaskPlan, asked: int | None) -> TaskPlan:
    if plan.few_shot(asked) == asked or asked is None:
        return plan
    note = f"{plan.name} is zero-shot by definition; --few-shot {asked} does not apply to it"
    return replace(plan, notes=(*plan.notes, note))


def _local_plan(data: LocalTaskData) -> TaskPlan:
    files = [data.documents, *([] if data.examples is None else [data.examples])]
    tasks = local_tasks(data)
    notes = []
    if data.name == "mmlu" and (absent := len(mmlu_subjects()) - len(tasks)):
        notes.append(f"{data.documents.path} lacks {absent} of MMLU's {len(mmlu_subjects())} subjects")
    return _plan(
        data.name,
        tasks,
        data=" and ".join(file.path.name for file in files),
        data_hash=hash_value([file.sha256 for file in files]),
        has_examples=data.examples is not None,
        notes=notes,
    )


def _hub_plans(name: str, progress: Progress) -> Iterable[TaskPlan]:
    for plan_name, tasks in hub_tasks(name, progress).items():
        sources = sorted({f"{task.DATASET_PATH}" for task in tasks.values()})
        yield _plan(
            plan_name,
            tasks,
            data=f"Hub data set {' and '.join(sources)}",
            data_hash=hash_value([_hash_documents(task) for task in tasks.values()]),
            has_examples=True,
            notes=[],
        )


def _plan(name: str, tasks: Tasks, *, data: str, data_hash: str, has_examples: bool, notes: list[str]) -> TaskPlan:
    first = next(iter(tasks.values()))
    default = first.get_config("num_fewshot")
    return TaskPlan(
        name=name,
        metric=primary_metric(name, first),
        filter=first._filters[0].name,
        default_few_shot=default or 0,
        always_zero_shot=default == 0,
        most_few_shot=min(_examples(task) for task in tasks.values()) if has_examples else 0,
        documents=sum(len(_documents(task)) for task in tasks.values()),
        data=data,
        data_hash=data_hash,
        versions=MappingProxyType({"lm_eval": lm_eval.__version__, "task": str(first.VERSION)}),
        notes=tuple(notes),
        tasks=MappingProxyType(tasks),
    )


def _documents(task: Any) -> Any:
    """The documents to score; `eval_docs` would process them anew at each look."""
    return getattr(task, "task_docs", None) or task.eval_docs


def _hash_documents(task: Any) -> str:
    digest = hashlib.sha256()
    for document in _documents(task):
        digest.update(json.dumps(document, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _examples(task: Any) -> int:
    """How many few-shot examples a prompt can have; where lm-eval skips the document itself, it draws one more."""
    pool = len(task.sampler.df) if hasattr(task, "sampler") else 0
    return max(0, pool - 1) if task.fewshot_cfg.split == task.config.test_split else pool


def primary_metric(name: str, task: Any) -> str:
    """acc_norm where lm-eval has it, else acc, else exact_match, else the first mean over documents.

    Raises:
        UsageError: no metric of the task is a mean over documents of which more is better.
    """
    means = [
        metric
        for metric, aggregate in task.aggregation().items()
        if aggregate is mean and task.higher_is_better().get(metric)
    ]
    metric: str | None = next((metric for metric in (*PREFERRED_METRICS, *means) if metric in means), None)
    if metric is None:
        raise UsageError(
            f"task '{name}' reports {', '.join(task.aggregation())}: none is a score per document that can be compared",
            "choose another task; perplexity is measured on --data",
        )
    return metric
