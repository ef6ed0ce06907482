"""Ladders that `factorctl profile --tune` timed: a JSON file beside factorctl's other caches.

Readers ignore it, with a warning, when it is damaged.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import cast, get_args

from factorctl.errors import IntegrityError
from factorctl.ffn.paths import PathName, Steps
from factorctl.files.cache import cache_directory
from factorctl.files.publishing import sole_writer, write_file
from factorctl.files.strict_json import dump_json, read_json_object

CACHE_VERSION = 1


def cache_file() -> Path:
    """Where tuned ladders live: beside factorctl's other caches."""
    return cache_directory() / "paths.json"


def read_tuned(file: Path) -> dict[str, Steps]:
    """Tuned ladders by site key; empty when there is no file.

    Raises:
        IntegrityError: it is no JSON object.
        ValueError, KeyError, TypeError or AttributeError: it is not what `write_tuned` writes.
    """
    if not file.exists():
        return {}
    content = read_json_object(file)
    if content.get("version") != CACHE_VERSION:
        raise ValueError(f"version is not {CACHE_VERSION}")
    return {key: _checked(steps) for key, steps in content["sites"].items()}


def _checked(raw: list[tuple[int | None, str]]) -> Steps:
    names = get_args(PathName)
    steps = []
    for limit, path in raw:
        if path not in names or path == "dense" or not (limit is None or isinstance(limit, int)):
            raise ValueError(f"{[limit, path]} is no step")
        steps.append((limit, cast(PathName, path)))
    if not steps or steps[-1][0] is not None:
        raise ValueError("a ladder must end without a limit")
    return tuple(steps)


@functools.lru_cache(maxsize=4)
def ladders(file: Path) -> Mapping[str, Steps]:
    """Tuned ladders by site key, read once until `forget`; none, with a warning, where the file is damaged."""
    try:
        return read_tuned(file)
    except (IntegrityError, ValueError, KeyError, TypeError, AttributeError, OSError) as fault:
        warnings.warn(f"{file} is damaged ({fault}); using the shipped crossovers", stacklevel=2)
        return {}


def write_tuned(file: Path, tuned: Mapping[str, Steps]) -> None:
    """Add ladders to the cache file, atomically; a damaged file is replaced.

    Raises:
        ResourceError: the cache cannot be written.
    """
    with sole_writer(file, wait=True):
        forget()  # what another process has added meanwhile
        write_file(file, dump_json({"version": CACHE_VERSION, "sites": {**ladders(file), **tuned}}))
    forget()


def forget() -> None:
    """Read the cache file again at the next choice."""
    global _generation
    _generation += 1
    ladders.cache_clear()


_generation = 0


def generation() -> int:
    """Changes with every `forget`: whoever keeps a ladder compares."""
    return _generation
