"""JSON from files that may be damaged or hostile: no duplicate keys, no NaN, bounded size and depth.

A *sealed* object carries the sha256 of its own content, so that a flipped byte in it is found.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from factorctl.errors import IntegrityError

MAX_BYTES = 256 * 1024 * 1024
"""An index of a very large checkpoint is a few MB; anything past this is not one of ours."""
MAX_DEPTH = 64
SEAL = "sha256"
"""Key of the seal in a sealed object."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        IntegrityError: the file is missing, unreadable, too large, too deep, repeats a key, or holds no object.
    """
    try:
        if not path.is_file() and path.exists():
            raise IntegrityError(f"{path} cannot be read: it is no regular file")
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
        value = json.loads(
            text, object_pairs_hook=_without_duplicates, parse_constant=_no_constant, parse_float=_finite
        )
    except RecursionError:
        raise IntegrityError(f"{origin} is nested too deeply") from None
    except ValueError as error:
        raise IntegrityError(f"{origin} is not valid JSON: {str(error)[:300]}") from None
    if not isinstance(value, dict):
        raise IntegrityError(f"{origin} holds a {type(value).__name__}, not a JSON object")
    if _depth_exceeds(value, MAX_DEPTH):
        raise IntegrityError(f"{origin} is nested more than {MAX_DEPTH} levels deep")
    if _SURROGATE.search(text) and not _is_encodable(value):
        raise IntegrityError(f"{origin} holds half a surrogate pair, which is no character")
    return value


def read_sealed(path: Path) -> dict[str, Any]:
    """The content of a sealed object, without its seal.

    Raises:
        IntegrityError: it is damaged in any way.
    """
    value = read_json_object(path)
    recorded, found = value.pop(SEAL, None), seal_of(value)
    if recorded != found:
        raise IntegrityError(f"{path} is damaged: its content has sha256 {found}, it says {str(recorded)[:80]}")
    return value


def dump_sealed(value: Mapping[str, Any]) -> bytes:
    return dump_json({**value, SEAL: seal_of(value)})


def seal_of(value: object) -> str:
    """sha256 of a JSON value as `dump_json` writes it."""
    return hashlib.sha256(dump_json(value)).hexdigest()


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


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:40]} is beyond the range of a number")
    return value


def _is_encodable(value: object) -> bool:
    try:
        dump_json(value)
    except UnicodeEncodeError:
        return False
    return True


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
