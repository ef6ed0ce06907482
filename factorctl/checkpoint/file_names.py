"""File names that come out of manifests, indexes and archives: plain names inside one directory, or refused."""

from __future__ import annotations

import os
import re
from pathlib import Path

from factorctl.errors import IntegrityError

MANIFEST_NAME = "factorctl.json"
"""Written last: its presence makes a directory a complete artefact."""

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+\- ]{0,199}")


def plain_name(name: object, *, origin: str) -> str:
    """`name` if it is a plain file name: no separator, no leading dot, no control or exotic character.

    Raises:
        IntegrityError: naming the origin, so that `../../etc/passwd` in an index is never opened.
    """
    if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
        raise IntegrityError(
            f"{origin} names the file {str(name)[:120]!r}; only plain names in its own directory may be"
        )
    return name


def regular_file(directory: Path, name: str, *, origin: str) -> Path:
    """The path of a regular file in `directory` that is no symbolic link out of it.

    Raises:
        IntegrityError: the file is missing, no regular file, or leads outside.
    """
    path = directory / plain_name(name, origin=origin)
    if path.is_symlink() and os.path.dirname(os.path.realpath(path)) != os.path.realpath(directory):
        raise IntegrityError(f"{path} is a symbolic link that leads out of its directory")
    if not path.is_file():
        raise IntegrityError(f"{path}, named by {origin}, is missing")
    return path
