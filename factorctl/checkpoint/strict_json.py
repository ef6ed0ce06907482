"""JSON from files that may be damaged or hostile: no duplicate keys, no NaN, bounded size and depth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from factorctl.errors import IntegrityError

MAX_BYTES = 256 * 1024 * 1024
"""An index of a very large checkpoint is a few MB; anything past this is not one of ours."""
MAX_DEPTH = 64


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        IntegrityError: the file is missing, unreadable, too large, too deep, repeats a key, or holds no object.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise IntegrityError(f"{path} is larger than {MAX_BYTES // 2**20} MiB; it is no JSON file of a checkpoint")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise IntegrityError(f"{path} is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{path} cannot be read: {error}") from None
    return parse_json_object(text, origin=str(path))


def parse_json_object(text: str, *, origin: str) -> dict[str, Any]:
    """The JSON object in `text`; `origin` names it in errors."""
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
    except RecursionError:
        raise IntegrityError(f"{origin} is nested too deeply") from None
    except ValueError as error:
        raise IntegrityError(f"{origin} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise IntegrityError(f"{origin} holds a {type(value).__name__}, not a JSON object")
    if _depth_exceeds(value, MAX_DEPTH):
        raise IntegrityError(f"{origin} is nested more than {MAX_DEPTH} levels deep")
    return value


def dump_json(value: object) -> bytes:
    """The one way in which this project writes JSON: sorted, indented, the same bytes for the same value."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:80]!r} stands twice")
            seen.add(key)
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _depth_exceeds(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            child
            for node in level
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return False
    return True
