"""lm-eval's own task definitions: finding them by name, and loading them over local rows or the Hub's data."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

import lm_eval.tasks
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from factorctl.errors import UsageError
from factorctl.evaluation.tasks.local_files import LocalTaskData
from factorctl.evaluation.tasks.quiet import quiet_libraries
from factorctl.evaluation.tasks.schemas import PAPER_TASKS
from factorctl.progress import Progress

Tasks = dict[str, Any]
"""lm-eval's name of a task -> its Task object, data loaded."""

_FOLDERS = ("hellaswag", "openbookqa", "winogrande", "arc", "super_glue/boolq", "piqa", "mmlu/default")


@functools.cache
def paper_index() -> TaskManager:
    """The definitions of the eight tasks alone: indexing lm-eval's 14,000 files takes 12 s and more."""
    root = Path(lm_eval.tasks.__file__).parent
    with quiet_libraries():
        return TaskManager(include_defaults=False, include_path=[root / folder for folder in _FOLDERS])


@functools.cache
def full_index() -> TaskManager:
    """Every definition that lm-eval brings."""
    with quiet_libraries():
        return TaskManager()


def index_for(name: str, progress: Progress) -> TaskManager:
    """The index that holds `name`.

    Raises:
        UsageError: lm-eval has no such task, group or tag; with the closest names.
    """
    if name in PAPER_TASKS and name in paper_index().task_index:
        return paper_index()
    with progress.stage("reading lm-eval's list of tasks"):
        index = full_index()
    if name not in index.task_index:
        raise UsageError(f"unknown task '{name}'", closest_names(name, index.all_tasks))
    return index


def closest_names(name: str, known: Collection[str]) -> str:
    """The hint for an unknown task: the paper's own names first, and never all fourteen thousand."""
    close = difflib.get_close_matches(name, ["paper", *PAPER_TASKS], n=1) or difflib.get_close_matches(name, known, n=3)
    meant = f"did you mean {' or '.join(repr(match) for match in close)}? " if close else ""
    return f"{meant}'paper' stands for {', '.join(PAPER_TASKS)}; `lm_eval ls tasks` lists all others"


def mmlu_subjects() -> Mapping[str, str]:
    """MMLU's subject -> lm-eval's name of its task."""
    entries = {name: entry.cfg or {} for name, entry in paper_index().task_index.items()}
    return {cfg["dataset_name"]: name for name, cfg in entries.items() if cfg.get("dataset_path") == "cais/mmlu"}


class LocalTask(ConfigurableTask):  # type: ignore[misc]  # lm-eval has no types
    """A task as lm-eval defines it, prompts, metrics and version, over rows from a local file.

    lm-eval makes it itself: a definition may name the class to be made from it (`class:`).
    """

    data: ClassVar[LocalTaskData]

    def __init__(self, config: dict[str, Any]) -> None:
        config = {key: value for key, value in config.items() if key != "class"}
        if config.get("test_split"):
            config["validation_split"] = None
        if self.data.examples is None:
            config |= {"training_split": None, "fewshot_split": None}
        super().__init__(config=config)

    def download(self, dataset_kwargs: object = None, **others: object) -> None:
        """The splits that this definition reads, from memory: here lm-eval would ask the Hub."""
        config = self.config
        self.dataset = self.data.splits(
            evaluated=config.test_split or config.validation_split,
            examples=config.fewshot_split or config.training_split,
            subject=config.dataset_name if self.data.name == "mmlu" else None,
        )


def local_tasks(data: LocalTaskData) -> Tasks:
    """lm-eval's task for `data`; for MMLU, those of the subjects that the file holds."""
    names = [data.name] if data.name != "mmlu" else [mmlu_subjects()[subject] for subject in data.subjects()]
    made_from = type("LocalTask", (LocalTask,), {"data": data})
    group = {"group": f"local {data.name}", "task": [{"task": name, "class": made_from} for name in names]}
    with quiet_libraries():
        tasks: Tasks = paper_index().load(group)["tasks"]
    return tasks
