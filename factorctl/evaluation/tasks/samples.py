"""`samples_*.jsonl`: one model's answers to one task on disk, whole or not at all, and read back strictly.

The first line is the summary (`TaskScores.summary`), each further line one document.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from factorctl.errors import FactorctlError, IntegrityError, UsageError
from factorctl.evaluation.tasks.scores import DocumentAnswer, TaskScores
from factorctl.files.publishing import write_file
from factorctl.files.strict_json import parse_json_object

FORMAT = 1
_NUMBER: tuple[type, ...] = (int, float)
_ANSWER_TYPES: dict[str, tuple[type, ...]] = {
    "task": (str,),
    "doc_id": (int,),
    "doc_hash": (str,),
    "prompt_hash": (str,),
    "target": (int, list, str),
    "loglikelihoods": (list,),
    "outputs": (list,),
    "acc": (*_NUMBER, type(None)),
    "acc_norm": (*_NUMBER, type(None)),
    "score": _NUMBER,
}
_HEADER_TYPES: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "metric": (str,),
    "few_shot": (int,),
    "limit": (int, type(None)),
    "seed": (int,),
    "batch_size": (int,),
    "data": (str,),
    "fingerprint": (str,),
    "versions": (dict,),
}


def write_samples(path: Path, scores: TaskScores) -> None:
    """Write `scores` so that `path` holds all of them or what it held before."""
    lines: list[dict[str, Any]] = [{"factorctl_samples": FORMAT, **scores.summary()}]
    lines += [asdict(answer) for answer in scores.documents]
    dumped = (json.dumps(line, ensure_ascii=False, allow_nan=False) for line in lines)
    write_file(path, ("\n".join(dumped) + "\n").encode())


def read_samples(path: Path) -> TaskScores:
    """The scores that `write_samples` wrote.

    Raises:
        UsageError: the file cannot be opened.
        IntegrityError: it is no such file, or not as it was written; with the line.
    """
    try:
        return _scores(_lines(path))
    except _Damaged as damage:
        raise IntegrityError(f"{path}{damage}", "delete it and run the evaluation again") from None


def _lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise _Damaged(" is not UTF-8") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    return [(number, parse_json_object(line, origin=f"{path}, line {number}")) for number, line in numbered]


class _Damaged(FactorctlError):
    """What is wrong, to stand behind the path."""


def _scores(lines: list[tuple[int, dict[str, Any]]]) -> TaskScores:
    if not lines or lines[0][1].get("factorctl_samples") != FORMAT:
        raise _Damaged(f" does not begin with the summary of a samples file of format {FORMAT}")
    header = lines[0][1]
    answers = [DocumentAnswer(**_checked(raw, _ANSWER_TYPES, number)) for number, raw in lines[1:]]
    known = {name: header[name] for name in header.keys() & _HEADER_TYPES.keys()}
    scores = TaskScores(**_checked(known, _HEADER_TYPES, lines[0][0]), documents=answers)
    if header.get("n") != len(answers) or not answers:
        raise _Damaged(f" holds {len(answers)} documents; its first line says {header.get('n')}")
    if header != {"factorctl_samples": FORMAT, **scores.summary()}:
        raise _Damaged(": its documents do not add up to its first line")
    return scores


def _checked(raw: dict[str, Any], types: dict[str, tuple[type, ...]], number: int) -> dict[str, Any]:
    for name, allowed in types.items():
        if name not in raw:
            raise _Damaged(f", line {number} has no field '{name}'")
        if isinstance(raw[name], bool) or not isinstance(raw[name], allowed):
            raise _Damaged(f", line {number}: field '{name}' is {raw[name]!r}")
    if unknown := sorted(raw.keys() - types.keys()):
        raise _Damaged(f", line {number} has an unknown field '{unknown[0]}'")
    return raw
