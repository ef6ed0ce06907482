"""The dense model that a checkpoint was made from: where its manifest says it is, and whether it still is that one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from factorctl.checkpoint.hashing import hash_file
from factorctl.checkpoint.sources import Source, resolve
from factorctl.errors import FactorctlError, UsageError
from factorctl.pipeline.workspace import cache_directory
from factorctl.progress import Progress


def find_recorded_source(known: Mapping[str, Any], progress: Progress, *, wanted_for: str, hint: str) -> Source:
    """Where the manifest says the source is, else where it once came from.

    Args:
        known: the manifest's `source`.
        wanted_for: begins the message: what it is wanted for, and its id.
        hint: how to name it by hand.

    Raises:
        UsageError: it is in neither place.
    """
    recorded = known.get("path")
    fetched_by_name = known["id"] if known["kind"] in ("hub", "wheel") else None
    model = recorded if recorded and (Path(recorded) / "config.json").is_file() else fetched_by_name
    try:
        if model is not None:
            revision = known.get("revision") if model == known["id"] and known["kind"] == "hub" else None
            return resolve(str(model), revision=revision, cache=cache_directory(), progress=progress)
        reason = f"{recorded} is not there any more"
    except FactorctlError as error:
        reason = error.message
    raise UsageError(f"{wanted_for}; it was not found: {reason}", hint)


def has_recorded_weights(directory: Path, files: Mapping[str, Any]) -> bool:
    """Whether the weights in `directory` are those that a manifest recorded, by their hashes."""
    names = [name for name in files if name.endswith(".safetensors")]
    return bool(names) and all(
        (directory / name).is_file() and asdict(hash_file(directory / name)) == dict(files[name]) for name in names
    )
