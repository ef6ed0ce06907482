"""Tasks over the Hub's data, and what to do when it cannot be had."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]  # of httpx or httpx2

from factorctl.errors import FactorctlError, ResourceError, UsageError, first_cause, in_one_line
from factorctl.evaluation.tasks.definitions import Tasks, index_for
from factorctl.evaluation.tasks.quiet import quiet_libraries
from factorctl.evaluation.tasks.schemas import SCHEMAS
from factorctl.progress import Progress


def hub_tasks(name: str, progress: Progress) -> dict[str, Tasks]:
    """What lm-eval's `name` stands for, data loaded: plan name -> tasks.

    A group whose score is the mean over all its documents (MMLU) is one plan; other groups and tags are their tasks.

    Raises:
        UsageError: unknown, or it needs a package that is not here, or it runs code that a model wrote.
        ResourceError: the Hub cannot be reached.
    """
    index = index_for(name, progress)
    _refuse_unsafe(entry.name for entry in _entries(index, name) if (entry.cfg or {}).get("unsafe_code"))
    try:
        with quiet_libraries(), progress.stage(f"fetching the data of {name}"):
            loaded = index.load(name)
    except FactorctlError:
        raise
    except Exception as error:  # lm-eval, datasets and the task's own code raise what they like
        _explain(name, error)
    tasks: Tasks = loaded["tasks"]
    _refuse_unsafe(task for task, made in tasks.items() if getattr(made, "UNSAFE_CODE", False))
    pooled = _is_pooled(loaded.get("groups", {}).get(name))
    return {name: tasks} if pooled else {task: {task: made} for task, made in tasks.items()}


def _entries(index: Any, name: str) -> Iterator[Any]:
    """What can be known of `name` before loading it: loading HumanEval alone fetches code that runs code."""
    entry = index.task_index[name]
    yield entry
    listed = (entry.cfg or {}).get("task")
    for member in (*entry.tags, *(listed if isinstance(listed, list) else ())):
        if isinstance(member, str) and member in index.task_index:
            yield index.task_index[member]


def _refuse_unsafe(tasks: Iterable[str]) -> None:
    if unsafe := next(iter(tasks), None):
        raise UsageError(f"task '{unsafe}' runs code that the model writes", "run it with lm-eval itself, in a sandbox")


def _is_pooled(group: Any) -> bool:
    """Whether the group's score is the mean over documents, whichever of its tasks they belong to."""
    metrics = [] if group is None else group.aggregate_metric_list or []
    return bool(metrics) and all(metric.aggregation == "mean" and metric.weight_by_size for metric in metrics)


def _explain(name: str, error: Exception) -> NoReturn:
    reason = in_one_line(error)
    if isinstance(error, ImportError):
        package = (error.name or "").partition(".")[0]
        raise UsageError(
            f"task '{name}' needs a package that is missing: {reason}", f"install {package or 'it'}"
        ) from error
    if isinstance(error, DatasetNotFoundError | HfHubHTTPError | TransportError | OSError):
        raise ResourceError(
            f"the data of task '{name}' cannot be fetched from the Hub: {in_one_line(first_cause(error))}",
            _use_local(name),
        ) from error
    raise UsageError(f"task '{name}' cannot be loaded by lm-eval: {reason}", _use_local(name)) from error


def _use_local(name: str) -> str:
    online = "unset HF_HUB_OFFLINE, or " if HF_HUB_OFFLINE else ""
    if name not in SCHEMAS:
        return f"{online}choose a task that --task-data serves: {', '.join(SCHEMAS)}"
    return (
        f"{online}give --task-data DIR with DIR/{name}.jsonl, of which each line needs "
        f"{', '.join(SCHEMAS[name].fields)} (docs/eval-tasks.md)"
    )
