"""Which field of a row holds the text: the one that the user names, else `text`, else a conversation, else the only
string where nothing beside it could be meant. Nothing else is ever guessed: an id or a URL is no text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from factorctl.data.account import SourceAccount
from factorctl.data.conversations import Message, messages_of, plain_text
from factorctl.data.documents import Document, domain_of
from factorctl.data.shapes import Shape, shape_of_value, shapes_of_rows, text_paths
from factorctl.errors import IntegrityError, UsageError, did_you_mean

TEXT_FIELD = "text"
CONVERSATION_FIELDS = ("messages", "conversations", "conversation")
LOOK_AHEAD = 64
"""Rows that decide about the field of a file whose first row has no `text`: exporters leave out what is null."""
_READ_KINDS = ("text", "bytes", "conversation", "null")
_OPTION = "--text-field"
_KIND_NAMES = {
    "strings": "a list of strings", "list": "a list", "object": "an object", "other": "numbers or other values",
}  # fmt: skip


@dataclass(frozen=True)
class TextField:
    """The field that is read."""

    path: tuple[str, ...]
    """Its name, behind those of the objects that it lies in."""
    chosen: bool
    """Whether it was inferred, not named `text` and not named by the user."""

    @property
    def name(self) -> str:
        return ".".join(self.path)


def choose_text_field(columns: Mapping[str, Shape], wanted: str | None, where: str) -> TextField:
    """The text field of a file, decided on its first rows or its schema.

    Raises:
        UsageError: the field asked for is missing, or several fields could be meant, naming `where`.
    """
    if wanted is not None:
        field = TextField(_path(columns, wanted, where), chosen=False)
        return _readable(field, _shape_at(columns, field.path), columns, where)
    if TEXT_FIELD in columns:
        return _readable(TextField((TEXT_FIELD,), chosen=False), columns[TEXT_FIELD], columns, where)
    conversations = [name for name, shape in columns.items() if shape.kind == "conversation"]
    named = [name for name in CONVERSATION_FIELDS if name in conversations]
    if named or len(conversations) == 1:
        return TextField(((named or conversations)[0],), chosen=True)
    strings = [name for name, shape in columns.items() if shape.kind == "text"]
    rivals = [name for name, shape in columns.items() if shape.kind not in ("text", "null", "other")]
    if len(strings) == 1 and not rivals:
        return TextField((strings[0],), chosen=True)
    raise UsageError(
        f"{where} has no field '{TEXT_FIELD}', and not just one other field that could hold the text "
        f"(found: {_described(columns)})",
        _name_one(columns),
    )


def read_rows(
    rows: Iterator[tuple[str, str, Mapping[str, object]]], wanted: str | None, account: SourceAccount
) -> Iterator[Document]:
    """The documents of rows that come as (id, where, row), the field chosen on the first of them.

    Raises:
        UsageError: as `choose_text_field` and `read_row` do.
    """
    first = next(rows, None)
    if first is None:
        return
    ahead = [first]
    if wanted is None and TEXT_FIELD not in first[2]:
        ahead += islice(rows, LOOK_AHEAD - 1)
    field = choose_text_field(shapes_of_rows([row for _, _, row in ahead]), wanted, first[1])
    for identity, where, row in chain(ahead, rows):
        if field.chosen and row.get(TEXT_FIELD) is not None:
            raise UsageError(
                f"{where} has a field '{TEXT_FIELD}', which no row before it has: there '{field.name}' was read",
                f"name the field with {_OPTION}",
            )
        document = read_row(row, field, identity, where, account)
        if document is not None:
            yield document


def read_row(
    row: Mapping[str, object], field: TextField, identity: str, where: str, account: SourceAccount
) -> Document | None:
    """The document of one row; None where its field is null or blank, or the source's filter passes it over.

    Raises:
        UsageError: the field, or the filter's, is missing, or holds no text.
        IntegrityError: the text is no valid Unicode.
    """
    if not account.admits(row, identity, where):
        return None
    value = _value_at(row, field.path, where)
    if value is None or value == []:
        account.omit(f"field '{field.name}' is {'null' if value is None else 'empty'}", identity)
        return None
    kind = shape_of_value(value).kind
    if kind == "bytes":
        value = _decoded(value, where, field)
    elif kind not in ("text", "conversation"):
        raise UsageError(
            f"{where}: field '{field.name}' holds {_KIND_NAMES[kind]}, not text", f"name another with {_OPTION}"
        )
    if isinstance(value, str):
        account.take(f"field '{field.name}'", identity)
        text = _encodable(value, where, field)
        return Document(text, account.source, identity, domain_of(row)) if text.strip() else None
    account.take(f"the conversation in field '{field.name}'", identity)
    messages: tuple[Message, ...] = messages_of(value, where, field.name)
    text = _encodable(plain_text(messages), where, field)
    if not text.strip():
        return None
    return Document(text, account.source, identity, domain_of(row), messages=messages)


def _path(columns: Mapping[str, Shape], wanted: str, where: str) -> tuple[str, ...]:
    """The way to a field: a column of that very name, else dots lead into objects."""
    way, inside, name = [], columns, wanted
    while name not in inside:
        head, _, name = name.partition(".")
        if not name or head not in inside:
            raise UsageError(f"{where} has no field '{wanted}'", did_you_mean(wanted, {*columns, *text_paths(columns)}))
        way.append(head)
        inside = inside[head].fields
    return (*way, name)


def _shape_at(columns: Mapping[str, Shape], path: Sequence[str]) -> Shape:
    shape = columns[path[0]]
    return shape if len(path) == 1 else _shape_at(shape.fields, path[1:])


def _readable(field: TextField, shape: Shape, columns: Mapping[str, Shape], where: str) -> TextField:
    if shape.kind in _READ_KINDS:
        return field
    advice = "join each list into one string" if shape.kind == "strings" else _name_one(columns)
    raise UsageError(f"{where}: field '{field.name}' holds {_KIND_NAMES[shape.kind]}, not text", advice)


def _name_one(columns: Mapping[str, Shape]) -> str:
    """The hint that names what could be named, where there is anything."""
    paths = [path for path in text_paths(columns) if path != TEXT_FIELD]
    if not paths:
        return 'give rows with a string as their text, like {"text": "..."}'
    return f"name the field with {_OPTION}: {', '.join(sorted(paths))}"


def _described(columns: Mapping[str, Shape]) -> str:
    """The fields of text; those that are lists or objects behind them."""
    strings = sorted(name for name, shape in columns.items() if shape.kind == "text")
    others = sorted(
        f"{name}, {_KIND_NAMES.get(shape.kind, shape.kind)}"
        for name, shape in columns.items()
        if shape.kind not in ("text", "null", "other")
    )
    return "; ".join(filter(None, [", ".join(strings), *others])) or "none"


def _value_at(row: Mapping[str, object], path: Sequence[str], where: str) -> object:
    value: object = row
    for depth, name in enumerate(path):
        if value is None:
            return None
        if not isinstance(value, Mapping) or name not in value:
            found = value if isinstance(value, Mapping) else {}
            raise UsageError(f"{where} has no field '{'.'.join(path[: depth + 1])}'", did_you_mean(name, found))
        value = value[name]
    return value


def _decoded(value: object, where: str, field: TextField) -> str:
    assert isinstance(value, bytes)
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise IntegrityError(
            f"{where}: field '{field.name}' holds bytes that are not UTF-8 (byte {error.start + 1})",
            f"name another with {_OPTION}, or convert it to UTF-8",
        ) from error


def _encodable(text: str, where: str, field: TextField) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise IntegrityError(f"{where}: field '{field.name}' is not valid Unicode (a lone surrogate)") from error
    return text
