"""One document of text, wherever it came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Document:
    """A piece of text that stands alone: attention and held-out splits never cut across its meaning."""

    text: str
    source: str
    """Name of the source as the user wrote it."""
    id: str
    """Where in the source: 'file:line' for files, 'repo:row' for Hub datasets."""
    tokens: Sequence[int] | None = None
    """Token ids where the text was made from them (`self`); such a document is not tokenised again."""
    messages: Sequence[Mapping[str, Any]] | None = None
    """The turns where the row holds a conversation; `text` then is what they say, without roles."""
