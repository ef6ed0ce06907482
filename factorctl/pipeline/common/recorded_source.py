"""The dense model that a checkpoint was made from: recorded in the manifest, found again by it, and held against it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from factorctl.checkpoint.gguf.source import cached_copy
from factorctl.checkpoint.manifest import Manifest
from factorctl.checkpoint.sources import Source, copied_files
from factorctl.errors import FactorctlError, IntegrityError, UsageError
from factorctl.files.cache import cache_directory
from factorctl.files.first_bytes import is_gguf
from factorctl.files.hashing import hash_file
from factorctl.files.names import name_in_artefact
from factorctl.files.strict_json import read_json_object
from factorctl.pipeline.common.dense_source import find_source
from factorctl.progress import Progress

CARD_FIELDS = ("license", "license_name", "license_link", "language", "base_model")
"""What is taken from the front matter of a README.md, all of them text or lists of text."""


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


def source_card(directory: Path) -> dict[str, Any]:
    """The fields of CARD_FIELDS that the README.md or, for the licence, the config.json of `directory` states."""
    facts = {key: value for key, value in _front_matter(directory / "README.md").items() if key in CARD_FIELDS}
    if "license" not in facts:
        try:
            named = read_json_object(directory / "config.json").get("license")
        except IntegrityError:
            named = None
        facts |= {"license": named} if named else {}
    return {key: facts[key] for key in CARD_FIELDS if _is_text(facts.get(key))}


def _front_matter(readme: Path) -> dict[str, Any]:
    """The YAML of a model card; nothing where there is no card, or one that nobody can read."""
    from huggingface_hub import metadata_load  # imports much, and only one step of a run asks

    if not readme.is_file():
        return {}
    try:
        found = metadata_load(readme)
    except Exception:  # anybody's file: YAML errors and wrong encodings of many types
        return {}
    return found if isinstance(found, dict) else {}


def _is_text(value: object) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, str) and item for item in value)
    return isinstance(value, str) and bool(value)


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
