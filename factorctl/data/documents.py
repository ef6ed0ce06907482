"""One document of text, wherever it came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DOMAIN_FIELDS = ("domain", "source")
"""Fields that name the sort of text that a row holds, the first there counting."""


@dataclass(frozen=True)
class Document:
    """A piece of text that stands alone: attention and held-out splits never cut across its meaning."""

    text: str
    source: str
    """Name of the source as the user wrote it."""
    id: str
    """Where in the source: 'file:line' for files, 'repo:row' for Hub datasets."""
    domain: str | None = None
    """What sort of text it is, where the row says so: `domain_of`."""
    tokens: Sequence[int] | None = None
    """Token ids where the text was made from them (`self`); such a document is not tokenised again."""
    messages: Sequence[Mapping[str, Any]] | None = None
    """The turns where the row holds a conversation; `text` then is what they say, without roles."""


def domain_of(row: Mapping[str, Any]) -> str | None:
    """The domain that a row names; None where it names none."""
    named = (row.get(field) for field in DOMAIN_FIELDS)
    return next((value for value in named if isinstance(value, str) and value), None)
