"""Which field of a row holds the text: `text`, else the only field of strings, else the one that the user names."""

from __future__ import annotations

from collections.abc import Mapping

from factorctl.errors import IntegrityError, UsageError, did_you_mean

TEXT_FIELD = "text"


def choose_text_field(row: Mapping[str, object], wanted: str | None, where: str) -> str:
    """The text field of a file, decided on its first row (or schema).

    Raises:
        UsageError: the field asked for is missing, or several fields could be meant, naming `where`.
    """
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if wanted is not None:
        if wanted not in row:
            raise UsageError(f"{where} has no field '{wanted}'", did_you_mean(wanted, row))
        return wanted
    if TEXT_FIELD in strings:
        return TEXT_FIELD
    if len(strings) == 1:
        return strings[0]
    found = ", ".join(sorted(strings)) or "none"
    raise UsageError(
        f"{where} has no field '{TEXT_FIELD}', and not just one other field of text (found: {found})",
        "name the field with --text-field",
    )


def text_of(row: Mapping[str, object], field: str, where: str) -> str:
    """The text of one row.

    Raises:
        UsageError: the field is missing or no string.
        IntegrityError: the text holds half of a surrogate pair, which no tokenizer can encode.
    """
    if field not in row:
        raise UsageError(f"{where} has no field '{field}'", did_you_mean(field, row))
    text = row[field]
    if not isinstance(text, str):
        raise UsageError(f"{where}: field '{field}' holds {_kind(text)}, not text", "name another with --text-field")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise IntegrityError(f"{where}: field '{field}' is not valid Unicode (a lone surrogate)") from error
    return text


def _kind(value: object) -> str:
    return "null" if value is None else f"a {type(value).__name__}"
