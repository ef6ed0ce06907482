"""What a column of rows holds, read off its values or its arrow type alike: text, a conversation, a list, an object."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import pyarrow as pa  # type: ignore[import-untyped]

Kind = Literal["null", "text", "bytes", "conversation", "strings", "list", "object", "other"]
TURN_KEYS = (("role", "content"), ("from", "value"))
"""(who, what) of a turn: as chat templates and OpenAI write conversations, and as ShareGPT does."""


@dataclass(frozen=True)
class Shape:
    """The kind of a column's values, and the columns inside of an object."""

    kind: Kind
    fields: Mapping[str, Shape] = field(default_factory=dict)


_NULL, _TEXT = Shape("null"), Shape("text")


def shapes_of_rows(rows: Sequence[Mapping[str, object]]) -> dict[str, Shape]:
    """Column -> shape over several rows: the first value that is not null or empty says what a column holds."""
    found: dict[str, Shape] = {}
    for row in rows:
        for name, value in row.items():
            if found.get(name, _NULL).kind in ("null", "list"):
                shape = shape_of_value(value)
                found[name] = shape if shape.kind != "null" else found.get(name, _NULL)
    return found


def shapes_of_schema(schema: pa.Schema) -> dict[str, Shape]:
    """Column -> shape as a parquet file declares it."""
    return {column.name: _shape_of_type(column.type) for column in schema}


def text_paths(columns: Mapping[str, Shape], prefix: str = "") -> Iterator[str]:
    """What `--text-field` may name: columns of text or conversations, those inside of objects with dots."""
    for name, shape in columns.items():
        if shape.kind in ("text", "conversation"):
            yield prefix + name
        yield from text_paths(shape.fields, f"{prefix}{name}.")


def shape_of_value(value: object) -> Shape:
    """The shape of one value as JSON and `datasets` give it."""
    if value is None:
        return _NULL
    if isinstance(value, str):
        return _TEXT
    if isinstance(value, bytes):
        return Shape("bytes")
    if isinstance(value, Mapping):
        return _object({str(name): shape_of_value(inner) for name, inner in value.items()})
    if isinstance(value, list | tuple):
        return _list_of(next((shape_of_value(item) for item in value if item is not None), _NULL))
    return Shape("other")


def _shape_of_type(kind: pa.DataType) -> Shape:
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return _shape_of_type(kind.storage_type)
    if types.is_dictionary(kind):
        return _shape_of_type(kind.value_type)
    if types.is_null(kind):
        return _NULL
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return _TEXT
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind):
        return Shape("bytes")
    if types.is_struct(kind):
        return _object({inner.name: _shape_of_type(inner.type) for inner in kind.fields})
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _list_of(_shape_of_type(kind.value_type))
    if types.is_list_view(kind) or types.is_large_list_view(kind):
        return _list_of(_shape_of_type(kind.value_type))
    return Shape("other")


def _list_of(item: Shape) -> Shape:
    if item.kind == "text":
        return Shape("strings")
    if item.kind == "object" and any(set(keys) <= set(item.fields) for keys in TURN_KEYS):
        return Shape("conversation")
    return Shape("list")


def _object(fields: Mapping[str, Shape]) -> Shape:
    """An object; one of lists that run beside each other is how `datasets` may store a list of turns."""
    for keys in TURN_KEYS:
        if all(fields.get(key, _NULL).kind == "strings" for key in keys):
            return Shape("conversation")
    return Shape("object", fields)
