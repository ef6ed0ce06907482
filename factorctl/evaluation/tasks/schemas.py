"""What a line of each task's file must hold: the fields of the Hub data set that the prompt and the answer are made of.

Other fields may stand beside them and are passed over, so that a document has the same hash wherever it came from.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from factorctl.errors import UsageError

Row = dict[str, Any]
Parser = Callable[[Any], Any]
"""A field's value as the Hub types it; raises ValueError that says what it must be."""


@dataclass(frozen=True)
class Schema:
    """The fields of one task's rows, in the order in which errors and docs list them."""

    fields: Mapping[str, Parser]
    agree: Callable[[Row], None] = lambda row: None
    """What the fields must have to do with one another; raises ValueError."""


def parse_row(raw: Mapping[str, Any], schema: Schema, where: str) -> Row:
    """The row with the schema's fields only.

    Raises:
        UsageError: a field is missing or not what it must be; the message names line and field.
    """
    row: Row = {}
    for name, parse in schema.fields.items():
        if name not in raw:
            raise UsageError(f"{where} has no field '{name}'", f"it needs {', '.join(schema.fields)}")
        try:
            row[name] = parse(raw[name])
        except ValueError as error:
            raise UsageError(f"{where}: field '{name}' is {shortened(raw[name])}; it must be {error}") from None
    try:
        schema.agree(row)
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from None
    return row


def shortened(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a string")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("a string without lone surrogates, which no file or tokenizer can hold")
    return value


def filled(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a string that is not blank")
    return text(value)


def key(value: Any) -> str:
    """A label's name; OpenBookQA's keys on the Hub have spaces around them here and there."""
    return filled(value).strip()


def number_below(limit: int) -> Parser:
    def parse(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < limit:
            raise ValueError("0 or 1" if limit == 2 else f"a number from 0 to {limit - 1}")
        return value

    return parse


def digit(value: Any) -> str:
    """The Hub stores HellaSwag's and WinoGrande's answers as strings; a number is taken too."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.isdecimal() or len(value) > 3:
        raise ValueError("a number, or a number as a string")
    return str(int(value))


def strings(least: int, most: int | None = None, *, item: Parser = filled) -> Parser:
    wanted = f"{least}" if most == least else f"at least {least}"

    def parse(value: Any) -> list[str]:
        try:
            parsed = [item(entry) for entry in value] if isinstance(value, list) else []
        except ValueError as error:
            raise ValueError(f"a list in which each item is {error}") from None
        if len(parsed) < least or (most is not None and len(parsed) > most):
            raise ValueError(f"a list of {wanted} strings")
        return parsed

    return parse


def labelled_choices(value: Any) -> dict[str, list[str]]:
    """{"text": [...], "label": [...]}, as in ARC and OpenBookQA."""
    try:
        texts, labels = strings(2)(value["text"]), strings(2)(value["label"])
    except (TypeError, KeyError, ValueError):
        raise ValueError('{"text": [two or more strings], "label": [as many strings]}') from None
    if len(texts) != len(labels) or len(set(labels)) != len(labels):
        raise ValueError("two lists of the same length, 'text' and 'label', the labels all different")
    return {"text": texts, "label": labels}


def _answer_is_a_label(row: Row) -> None:
    if row["answerKey"] not in row["choices"]["label"]:
        raise ValueError(f"answerKey {shortened(row['answerKey'])} is none of the labels {row['choices']['label']}")


def _label_is_an_ending(row: Row) -> None:
    if int(row["label"]) >= len(row["endings"]):
        raise ValueError(f"label {row['label']} is none of the {len(row['endings'])} endings, counted from 0")


def _sentence_has_a_blank(row: Row) -> None:
    _before, blank, after = row["sentence"].partition("_")
    if not blank or not after.strip():
        raise ValueError("field 'sentence' must hold the blank, '_', and text behind it")
    if row["answer"] not in ("1", "2"):
        raise ValueError(f'field \'answer\' is {shortened(row["answer"])}; it must be "1" or "2"')


_ARC = Schema({"question": text, "choices": labelled_choices, "answerKey": key}, _answer_is_a_label)

SCHEMAS: Mapping[str, Schema] = MappingProxyType(
    {
        "hellaswag": Schema(
            {"activity_label": text, "ctx_a": text, "ctx_b": text, "endings": strings(2), "label": digit},
            _label_is_an_ending,
        ),
        "openbookqa": Schema(
            {"question_stem": filled, "choices": labelled_choices, "answerKey": key}, _answer_is_a_label
        ),
        "winogrande": Schema(
            {"sentence": filled, "option1": filled, "option2": filled, "answer": digit}, _sentence_has_a_blank
        ),
        "arc_easy": _ARC,
        "arc_challenge": _ARC,
        "boolq": Schema({"question": text, "passage": text, "label": number_below(2)}),
        "piqa": Schema({"goal": text, "sol1": filled, "sol2": filled, "label": number_below(2)}),
        "mmlu": Schema(
            {"question": text, "subject": filled, "choices": strings(4, 4, item=text), "answer": number_below(4)}
        ),
    }
)
"""The eight tasks of the paper, in its order."""

PAPER_TASKS = tuple(SCHEMAS)


def mmlu_schema(subjects: Collection[str]) -> Schema:
    """MMLU's schema with the subjects that lm-eval knows."""

    def known(row: Row) -> None:
        if row["subject"] not in subjects:
            raise ValueError(
                f"field 'subject' is {shortened(row['subject'])}, which is none of MMLU's {len(subjects)} subjects"
            )

    return Schema(SCHEMAS["mmlu"].fields, known)
