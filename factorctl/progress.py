"""How long work reports where it stands, without knowing who listens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """One running stage."""

    def advance(self, amount: int = 1, **fields: object) -> None:
        """Count `amount` units done; `fields` (loss=..., layer=...) replace what is shown beside the bar."""


class Progress(Protocol):
    """Listener for stages and remarks. The command line draws it; tests and libraries use `SilentProgress`."""

    def stage(self, title: str, total: int | None = None, unit: str = "") -> AbstractContextManager[Task]: ...

    def note(self, message: str) -> None:
        """A remark that the user should see once (a default taken, a layer that kept its values)."""


class _SilentTask:
    def advance(self, amount: int = 1, **fields: object) -> None:
        return None


class SilentProgress:
    """Shows nothing and keeps the remarks in `notes`."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    @contextmanager
    def stage(self, title: str, total: int | None = None, unit: str = "") -> Iterator[Task]:
        yield _SilentTask()

    def note(self, message: str) -> None:
        self.notes.append(message)
