"""sha256 of files and values: how artefacts are tied to their parents."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from factorctl.files.strict_json import seal_of


@dataclass(frozen=True)
class FileRecord:
    """What a manifest promises of one file."""

    sha256: str
    size: int


def hash_file(path: Path) -> FileRecord:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(sha256=digest, size=path.stat().st_size)


def hash_bytes(data: bytes) -> FileRecord:
    return FileRecord(sha256=hashlib.sha256(data).hexdigest(), size=len(data))


def hash_value(value: object) -> str:
    """sha256 of a JSON value in this project's canonical form."""
    return seal_of(value)
