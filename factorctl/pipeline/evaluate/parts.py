"""Finished parts of an evaluation, one file each, so that an interrupted run loses only the part it was at.

A part is one measurement of one model. Its file carries a fingerprint of all that decides the result: the model's
weights, dtype and library versions, the text or task, and the options. A part whose fingerprint is another by now is
computed again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from factorctl.errors import IntegrityError
from factorctl.files.hashing import hash_value
from factorctl.files.publishing import make_directory, write_file
from factorctl.files.strict_json import dump_json, read_json_object
from factorctl.progress import Progress


@dataclass(frozen=True)
class Measurement:
    """One measurement of one model."""

    subject: str
    """`model`, `dense` or the name of a control."""
    measure: str
    """`perplexity`, `task` or `fidelity`."""
    name: str
    """Of the text or task."""
    identity: Mapping[str, Any]
    """All that decides the result, as JSON."""

    @property
    def fingerprint(self) -> str:
        return hash_value(dict(self.identity))

    @property
    def stem(self) -> str:
        """The part as a file name: readable, and its own even where two names read alike."""
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{self.subject}-{self.measure}-{self.name}").strip("-.")[:80]
        return f"{plain}-{hash_value([self.subject, self.measure, self.name])[:8]}"


@dataclass
class PartStore:
    """The directory of finished parts. Without `resume` nothing is read from it."""

    directory: Path
    resume: bool
    progress: Progress
    kept: int = 0
    """Parts that this run finished."""

    def find(self, part: Measurement) -> dict[str, Any] | None:
        """The result of a finished part, or None where it has to be computed."""
        path = self.path_of(part)
        if not self.resume or not path.is_file():
            return None
        try:
            stored = read_json_object(path)
        except IntegrityError as error:
            self.progress.note(f"{error.message}; that part is computed again")
            return None
        result, what = stored.get("result"), f"{part.measure} {part.name} of {part.subject}"
        if not isinstance(result, dict) or stored.get("result_sha256") != hash_value(result):
            self.progress.note(f"{path} is not what was written; {what} is computed again")
            return None
        if stored.get("fingerprint") != part.fingerprint:
            self.progress.note(f"{what}: model, data or options changed since; computed again")
            return None
        return result

    def keep(self, part: Measurement, result: Mapping[str, Any]) -> None:
        """Write a finished part: whole, or not at all."""
        content = {
            "fingerprint": part.fingerprint,
            "identity": dict(part.identity),
            "result": dict(result),
            "result_sha256": hash_value(dict(result)),
        }
        make_directory(self.directory)
        write_file(self.path_of(part), dump_json(content))
        self.kept += 1

    def path_of(self, part: Measurement, suffix: str = ".json") -> Path:
        return self.directory / f"{part.stem}{suffix}"
