"""The dense model that a checkpoint was made from: recorded in the manifest, found again by it, and held against it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from factorctl.checkpoint.gguf.source import cached_copy
from factorctl.checkpoint.manifest import Manifest
from factorctl.checkpoint.source_card import source_card
from factorctl.checkpoint.sources import Source, copied_files
from factorctl.errors import FactorctlError, UsageError
from factorctl.files.cache import cache_directory
from factorctl.files.first_bytes import is_gguf
from factorctl.files.hashing import hash_file
from factorctl.files.names import name_in_artefact
from factorctl.pipeline.common.dense_source import find_source
from factorctl.progress import Progress


def describe_source(source: Source) -> dict[str, Any]:
    """The manifest's account of the dense model: id, kind, revision, and the hash of every file.

    Only a source that cannot be fetched again by its id has its path recorded, for `finetune` to find its teacher.
    """
    files = sorted([*source.path.glob("*.safetensors"), *source.path.glob("*.json"), *copied_files(source.path)])
    return {
        "id": source.id,
        "kind": source.kind,
        "revision": source.revision,
        "path": str((source.file or source.path).resolve()) if source.kind in ("local", "gguf") else None,
        "card": source_card(source.path),
        "files": {name_in_artefact(path): asdict(hash_file(path)) for path in dict.fromkeys(files)},
    }


def find_recorded_source(known: Mapping[str, Any], progress: Progress, *, wanted_for: str, hint: str) -> Source:
    """Where the manifest says the source is, else where it once came from.

    Args:
        known: the manifest's `source`.
        wanted_for: begins the message: what it is wanted for, and its id.
        hint: how to name it by hand.

    Raises:
        UsageError: it is in neither place, or another file stands there by now.
    """
    recorded, kind, revision = known.get("path"), known["kind"], known.get("revision")
    try:
        if kind in ("hub", "wheel"):
            return find_source(str(known["id"]), progress, revision=revision if kind == "hub" else None)
        if recorded and _is_model(Path(recorded)):
            found = find_source(str(recorded), progress)
            if kind != "gguf" or found.file is None or found.revision == revision:
                return found
            reason = (
                f"{recorded} is another file by now: its sha256 is {found.revision}, the manifest records {revision}"
            )
        else:
            reason = f"{recorded} is not there any more"
        if kind == "gguf" and (copy := cached_copy(str(revision), cache_directory())).is_dir():
            return Source(copy, str(known["id"]), "gguf", str(revision), (f"{reason}; the cached copy is used",))
    except FactorctlError as error:
        reason = error.message
    raise UsageError(f"{wanted_for}; it was not found: {reason}", hint)


def _is_model(path: Path) -> bool:
    return (path / "config.json").is_file() or is_gguf(path)


def has_recorded_weights(directory: Path, files: Mapping[str, Any]) -> bool:
    """Whether the weights in `directory` are those that a manifest recorded, by their hashes."""
    names = [name for name in files if name.endswith(".safetensors")]
    return bool(names) and all(
        (directory / name).is_file() and asdict(hash_file(directory / name)) == dict(files[name]) for name in names
    )


def holds_dense_values(manifest: Manifest) -> bool:
    """Whether the FFN values of a checkpoint still are the dense source's: factorized, neither refit nor trained."""
    return manifest.stage == "factorize" and not manifest.config.get("refit")
