"""recipe.lock.json: which key each stage was begun and finished with, and what it gave."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from factorctl.errors import IntegrityError
from factorctl.files.hashing import hash_file
from factorctl.files.publishing import make_directory, write_file
from factorctl.files.strict_json import dump_sealed, read_sealed

LOCK_NAME = "recipe.lock.json"
_START_OVER = "delete it: every stage runs again then"


@dataclass(frozen=True)
class Place:
    """Where a stage puts its result, and the file whose hash stands for all of it."""

    output: Path
    evidence: Path


def evidence_of(place: Place) -> str | None:
    return hash_file(place.evidence).sha256 if place.evidence.is_file() else None


class RecipeLock:
    """recipe.lock.json: which key each stage was begun and finished with, and what it gave."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stages: dict[str, Any] = {}
        if path.is_file():
            self._stages = _read_stages(path)

    def begun(self, label: str) -> str | None:
        return self._entry(label).get("begun")

    def holds(self, label: str, key: str, place: Place) -> bool:
        """Whether the stage finished with this key and its result is still the one that it gave."""
        entry = self._entry(label)
        return entry.get("finished") == key and entry.get("evidence") == evidence_of(place) is not None

    def result(self, label: str) -> dict[str, Any]:
        return dict(self._entry(label).get("result", {}))

    def begin(self, label: str, key: str) -> None:
        self._store(label, {"begun": key})

    def finish(self, label: str, key: str, place: Place, result: dict[str, Any]) -> None:
        self._store(label, {"begun": key, "finished": key, "evidence": evidence_of(place), "result": result})

    def _entry(self, label: str) -> dict[str, Any]:
        return dict(self._stages.get(label, {}))

    def _store(self, label: str, entry: dict[str, Any]) -> None:
        self._stages[label] = entry
        make_directory(self.path.parent)
        write_file(self.path, dump_sealed({"stages": self._stages}))


def _read_stages(path: Path) -> dict[str, Any]:
    """What a lock says of every stage.

    Raises:
        IntegrityError: it is not what was written.
    """
    try:
        stages = read_sealed(path).get("stages")
    except IntegrityError as error:
        raise IntegrityError(error.message, _START_OVER) from None
    if not isinstance(stages, dict) or not all(map(_is_entry, stages.values())):
        raise IntegrityError(f"{path} is damaged: it holds no stages", _START_OVER)
    return stages


def _is_entry(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("result", {}), dict)
