"""File names that come out of manifests, indexes and archives: plain names inside one directory, or refused."""

from __future__ import annotations

import os
import re
from pathlib import Path

from factorctl.errors import IntegrityError

MANIFEST_NAME = "factorctl.json"
"""Written last: its presence makes a directory a complete artefact."""

TEMPLATES = "additional_chat_templates"
"""The one directory inside an artefact: transformers keeps a tokenizer's further chat templates in it."""

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


def name_in_artefact(path: Path) -> str:
    """What a tokenizer's file is called in every artefact: its name, behind that of the templates' directory."""
    return f"{TEMPLATES}/{path.name}" if path.parent.name == TEMPLATES else path.name


def artefact_name(name: object, *, origin: str) -> str:
    """`name` if it is a plain file name, or one in the directory of further chat templates.

    Raises:
        IntegrityError: as `plain_name`.
    """
    directory, slash, rest = name.partition("/") if isinstance(name, str) else ("", "", "")
    if slash and directory == TEMPLATES:
        return f"{TEMPLATES}/{plain_name(rest, origin=origin)}"
    return plain_name(name, origin=origin)


def regular_file(directory: Path, name: str, *, origin: str) -> Path:
    """The path of a regular file in `directory` that is no symbolic link out of it.

    Raises:
        IntegrityError: the file is missing, no regular file, or leads outside.
    """
    path = directory / artefact_name(name, origin=origin)
    home = os.path.normpath(os.path.join(os.path.realpath(directory), os.path.dirname(name)))
    if os.path.dirname(os.path.realpath(path)) != home:
        raise IntegrityError(f"{path} is a symbolic link that leads out of its directory")
    if not path.is_file():
        raise IntegrityError(f"{path}, named by {origin}, is missing")
    return path
