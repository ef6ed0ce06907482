"""Task data from `--task-data DIR`: one JSONL file per task, every line checked before a model is asked anything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets

from factorctl.data.local_files import read_json_lines
from factorctl.errors import UsageError
from factorctl.evaluation.tasks.schemas import SCHEMAS, Row, Schema, parse_row
from factorctl.files.hashing import hash_file

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.bz2", ".jsonl.zst")


@dataclass(frozen=True)
class TaskFile:
    """One file's rows in their order."""

    path: Path
    sha256: str
    rows: list[Row]


@dataclass(frozen=True)
class LocalTaskData:
    """The documents to score, and the few-shot examples where a file holds some."""

    name: str
    documents: TaskFile
    examples: TaskFile | None

    def subjects(self) -> list[str]:
        """The values of MMLU's field `subject`, sorted."""
        return sorted({row["subject"] for row in self.documents.rows})

    def splits(self, *, evaluated: str, examples: str, subject: str | None) -> dict[str, datasets.Dataset]:
        """The rows under the names of the splits that lm-eval reads; of one subject only where it asks for one."""
        files = {evaluated: self.documents} | ({} if self.examples is None else {examples: self.examples})
        return {
            split: datasets.Dataset.from_list([row for row in file.rows if subject in (None, row.get("subject"))])
            for split, file in files.items()
        }


def examples_name(task: str) -> str:
    """The few-shot file's name without its ending: mmlu_dev, or piqa_train and so on."""
    return "mmlu_dev" if task == "mmlu" else f"{task}_train"


def read_task_data(directory: Path, tasks: Sequence[str], schemas: dict[str, Schema]) -> list[LocalTaskData]:
    """The files of `tasks`, all of them found before the first is read.

    Raises:
        UsageError: no such directory, files missing, a row that does not fit; with file, line and field.
        IntegrityError: a line is no JSON, or a compressed file is damaged.
    """
    if not directory.is_dir():
        raise UsageError(
            f"--task-data {directory} is not a directory", "give the directory that holds TASK.jsonl files"
        )
    found = {task: _find(directory, task) for task in tasks}
    if missing := [task for task, path in found.items() if path is None]:
        raise UsageError(
            f"{' and '.join(f'{directory / task}.jsonl' for task in missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing",
            f"a line of {missing[0]}.jsonl needs {', '.join(SCHEMAS[missing[0]].fields)}; "
            f"or leave {' and '.join(missing)} out of --tasks",
        )
    return [_task_data(task, path, directory, schemas[task]) for task, path in found.items() if path is not None]


def _task_data(task: str, path: Path, directory: Path, schema: Schema) -> LocalTaskData:
    examples = _find(directory, examples_name(task))
    return LocalTaskData(task, _read(path, schema), None if examples is None else _read(examples, schema))


def _find(directory: Path, stem: str) -> Path | None:
    candidates = (directory / f"{stem}{suffix}" for suffix in SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def _read(path: Path, schema: Schema) -> TaskFile:
    rows = list(_rows(path, schema))
    if not rows:
        raise UsageError(f"{path} holds no row", f"each line needs {', '.join(schema.fields)}")
    return TaskFile(path, hash_file(path).sha256, rows)


def _rows(path: Path, schema: Schema) -> Iterator[Row]:
    example = "{" + ", ".join(f'"{name}": ...' for name in schema.fields) + "}"
    for number, raw in read_json_lines(path, example):
        yield parse_row(raw, schema, f"{path}, line {number}")
