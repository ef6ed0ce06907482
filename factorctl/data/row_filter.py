"""Which rows of a source are read: `FILE:domain!=code+textbook`.

SOURCE:FIELD=A     SOURCE:FIELD=A+B     the rows whose field is A, or one of A and B
SOURCE:FIELD!=A    SOURCE:FIELD!=A+B    all others, those included whose field is null
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from factorctl.errors import UsageError, did_you_mean

_FILTERED = re.compile(r"(?P<source>.+?):(?P<field>[A-Za-z_][\w.-]*)(?P<sign>!?=)(?P<values>.+)", re.DOTALL)


@dataclass(frozen=True)
class RowFilter:
    """A condition on one field; dots lead into objects, as in `--text-field`."""

    field: str
    values: tuple[str, ...]
    keeps: bool
    """Whether rows with one of the values are the ones that are read, or the ones that are left out."""

    def __str__(self) -> str:
        return f"{self.field}{'=' if self.keeps else '!='}{'+'.join(self.values)}"

    def value_in(self, row: Mapping[str, object], where: str) -> str | None:
        """The field's value as text; None for null.

        Raises:
            UsageError: the row lacks the field.
        """
        inside: object = row
        name = self.field
        while isinstance(inside, Mapping) and name not in inside:
            head, _, name = name.partition(".")
            if not name or head not in inside:
                raise UsageError(
                    f"{where} has no field '{self.field}', which '{self}' asks for",
                    did_you_mean(self.field, map(str, row)),
                )
            inside = inside[head]
        value = inside[name] if isinstance(inside, Mapping) else None
        return None if value is None else str(value)

    def admits(self, value: str | None) -> bool:
        return (value in self.values) == self.keeps


def split_filter(text: str) -> tuple[str, RowFilter | None]:
    """A source as the user wrote it -> the source alone, and its condition where it has one.

    >>> split_filter("notes.jsonl:domain!=code+textbook")
    ('notes.jsonl', RowFilter(field='domain', values=('code', 'textbook'), keeps=False))
    """
    found = _FILTERED.fullmatch(text)
    if found is None:
        return text, None
    values = tuple(value.strip() for value in found["values"].split("+"))
    return found["source"], RowFilter(found["field"], values, keeps=found["sign"] == "=")
