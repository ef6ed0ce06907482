"""Task files: what is taken, and what is refused with which words. No model, no definitions of lm-eval."""

from __future__ import annotations

import gzip
import json
import lzma
import random
from pathlib import Path
from typing import Any

import pytest
from support.tasks import SUBJECTS, make_row, make_task_data, write_rows

from factorctl.errors import FactorctlError, IntegrityError, UsageError
from factorctl.evaluation.tasks import PAPER_TASKS
from factorctl.evaluation.tasks.local_files import LocalTaskData, read_task_data
from factorctl.evaluation.tasks.schemas import SCHEMAS, mmlu_schema


def read(directory: Path, *tasks: str) -> list[LocalTaskData]:
    return read_task_data(directory, tasks, dict(SCHEMAS) | {"mmlu": mmlu_schema(SUBJECTS)})


def row_of(task: str, **changes: Any) -> dict[str, Any]:
    return {**make_row(task, 0, random.Random(0)), **changes}


def refusal(directory: Path, task: str, *rows: dict[str, Any]) -> FactorctlError:
    write_rows(directory / f"{task}.jsonl", [row_of(task), *rows])
    with pytest.raises(FactorctlError) as caught:
        read(directory, task)
    return caught.value


@pytest.mark.parametrize("task", PAPER_TASKS)
def test_rows_keep_what_prompts_need_and_nothing_else(tmp_path: Path, task: str) -> None:
    (data,) = read(make_task_data(tmp_path, rows=5, tasks=(task,)), task)
    assert len(data.documents.rows) == 5
    assert all(row.keys() == SCHEMAS[task].fields.keys() for row in data.documents.rows)
    assert data.examples is not None
    assert len(data.examples.rows) == 6


@pytest.mark.parametrize("task", PAPER_TASKS)
def test_every_missing_field_is_named_with_its_line(tmp_path: Path, task: str) -> None:
    for field in SCHEMAS[task].fields:
        without = {name: value for name, value in row_of(task).items() if name != field}
        error = refusal(tmp_path, task, without)
        assert isinstance(error, UsageError)
        assert error.message == f"{tmp_path / task}.jsonl, line 2 has no field '{field}'"
        assert error.hint == f"it needs {', '.join(SCHEMAS[task].fields)}"


@pytest.mark.parametrize(
    ("task", "changes", "complaint"),
    [
        ("piqa", {"label": "0"}, "field 'label' is '0'; it must be 0 or 1"),
        ("piqa", {"label": True}, "field 'label' is True; it must be 0 or 1"),
        ("piqa", {"label": 2}, "field 'label' is 2; it must be 0 or 1"),
        ("piqa", {"goal": 3}, "field 'goal' is 3; it must be a string"),
        ("piqa", {"sol1": "  "}, "field 'sol1' is '  '; it must be a string that is not blank"),
        ("boolq", {"label": "yes"}, "field 'label' is 'yes'; it must be 0 or 1"),
        ("boolq", {"passage": None}, "field 'passage' is None; it must be a string"),
        ("mmlu", {"answer": 4}, "field 'answer' is 4; it must be a number from 0 to 3"),
        ("mmlu", {"choices": ["a"] * 3}, "field 'choices' is ['a', 'a', 'a']; it must be a list of 4 strings"),
        ("mmlu", {"subject": "alchemy"}, "field 'subject' is 'alchemy', which is none of MMLU's 2 subjects"),
        ("hellaswag", {"endings": "abcd"}, "field 'endings' is 'abcd'; it must be a list of at least 2 strings"),
        ("hellaswag", {"endings": ["a", 1]}, "field 'endings' is ['a', 1]; it must be a list in which each item is a"),
        ("hellaswag", {"label": ""}, "field 'label' is ''; it must be a number, or a number as a string"),
        ("hellaswag", {"label": "4"}, "label 4 is none of the 4 endings, counted from 0"),
        ("winogrande", {"answer": "3"}, "field 'answer' is '3'; it must be \"1\" or \"2\""),
        ("winogrande", {"sentence": "no blank"}, "field 'sentence' must hold the blank, '_', and text behind it"),
        ("winogrande", {"sentence": "at the end _"}, "field 'sentence' must hold the blank, '_', and text behind it"),
        ("openbookqa", {"answerKey": "F"}, "answerKey 'F' is none of the labels ['A', 'B', 'C', 'D']"),
        ("hellaswag", {"label": "9" * 5000}, "it must be a number, or a number as a string"),
        ("boolq", {"question": "\ud800"}, "field 'question' is '\\ud800'; it must be a string without lone surrogates"),
        ("arc_easy", {"choices": ["a", "b"]}, "field 'choices' is ['a', 'b']; it must be {\"text\": [two or more"),
        ("arc_easy", {"choices": {"text": ["a", "b"], "label": ["A", "B", "C"]}}, "it must be two lists of the same"),
    ],
)
def test_a_wrong_field_is_named_with_what_it_must_be(
    tmp_path: Path, task: str, changes: dict[str, Any], complaint: str
) -> None:
    message = refusal(tmp_path, task, row_of(task, **changes)).message
    assert message.startswith(f"{tmp_path / task}.jsonl, line 2: ")
    assert complaint in message


def test_answers_may_be_numbers_where_the_hub_has_them_as_strings(tmp_path: Path) -> None:
    write_rows(tmp_path / "winogrande.jsonl", [row_of("winogrande", answer=2)])
    write_rows(tmp_path / "hellaswag.jsonl", [row_of("hellaswag", label=3)])
    winogrande, hellaswag = read(tmp_path, "winogrande", "hellaswag")
    assert winogrande.documents.rows[0]["answer"] == "2"
    assert hellaswag.documents.rows[0]["label"] == "3"


def test_all_missing_files_are_named_at_once(tmp_path: Path) -> None:
    make_task_data(tmp_path, tasks=("piqa",))
    with pytest.raises(UsageError) as caught:
        read(tmp_path, "hellaswag", "piqa", "boolq")
    assert caught.value.message == f"{tmp_path}/hellaswag.jsonl and {tmp_path}/boolq.jsonl are missing"
    assert caught.value.hint == (
        "a line of hellaswag.jsonl needs activity_label, ctx_a, ctx_b, endings, label; "
        "or leave hellaswag and boolq out of --tasks"
    )


def test_a_directory_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--task-data .*nowhere is not a directory"):
        read(tmp_path / "nowhere", "piqa")


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "piqa.jsonl").write_text("\n\n")
    with pytest.raises(UsageError, match=r"piqa\.jsonl holds no row"):
        read(tmp_path, "piqa")


def test_a_line_that_is_no_json_and_one_that_is_no_object(tmp_path: Path) -> None:
    (tmp_path / "piqa.jsonl").write_text(json.dumps(row_of("piqa")) + "\n{oops\n")
    with pytest.raises(IntegrityError, match=r"piqa\.jsonl, line 2 is not valid JSON"):
        read(tmp_path, "piqa")
    (tmp_path / "piqa.jsonl").write_text("[1]\n")
    with pytest.raises(IntegrityError) as caught:
        read(tmp_path, "piqa")
    assert caught.value.message.endswith("line 1 is not a JSON object")
    assert caught.value.hint == 'each line must be like {"goal": ..., "sol1": ..., "sol2": ..., "label": ...}'


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_compressed_files_are_read_and_damage_is_noticed(tmp_path: Path, suffix: str, compress: Any) -> None:
    plain = write_rows(tmp_path / "rows", [row_of("piqa")] * 3).read_bytes()
    path = tmp_path / f"piqa.jsonl{suffix}"
    path.write_bytes(compress(plain))
    (data,) = read(tmp_path, "piqa")
    assert len(data.documents.rows) == 3
    path.write_bytes(compress(plain)[:-8])
    with pytest.raises(IntegrityError, match="is corrupt or truncated"):
        read(tmp_path, "piqa")
