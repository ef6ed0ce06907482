"""factorctl.json: what an artefact is, what it came from, and what every one of its files must hash to.

The manifest is written last. A directory whose manifest is valid is a complete artefact; any other is not one.
It holds no clock times and no timings: the same work gives the same bytes.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from factorctl.errors import IntegrityError, UsageError
from factorctl.files.hashing import FileRecord, hash_file
from factorctl.files.names import MANIFEST_NAME as MANIFEST_NAME
from factorctl.files.names import TEMPLATES, artefact_name, regular_file
from factorctl.files.publishing import write_file
from factorctl.files.strict_json import SEAL, dump_sealed, read_json_object, seal_of

SCHEMA_VERSION = 1
MAX_FILE_SIZE = 2**50
_SHA256 = re.compile(r"[0-9a-f]{64}")

_Types = tuple[type, ...]
_TEXT, _COUNT, _NUMBER = (str,), (int,), (int, float)

REQUIRED_FIELDS: Mapping[str, Mapping[str, _Types]] = {
    "source": {"id": _TEXT, "kind": _TEXT, "files": (dict,)},
    "factored": {
        "num_experts": _COUNT,
        "top_k": _COUNT,
        "expert_size": _COUNT,
        "shared_size": _COUNT,
        "gate": _TEXT,
        "scale": _TEXT,
        "notation": _TEXT,
        "active_ffn_fraction": _NUMBER,
    },
}
OPTIONAL_FIELDS: Mapping[str, Mapping[str, _Types]] = {
    "source": {"revision": _TEXT, "path": _TEXT, "model_type": _TEXT, "card": (dict,)},
    "details": {"strategy": (dict,), "layers": (list,), "calibration": (dict,), "identity_error": _NUMBER},
}
"""May be absent or null, depending on the verb and the source."""
CALIBRATION_FIELDS: Mapping[str, _Types] = {"fingerprint": _TEXT, "tokens": _COUNT, "sources": (list,)}
LARGEST_NUMBER = 2**53
"""No number in a manifest is larger; what is computed with them stays within a float's exact range."""


@dataclass(frozen=True)
class Manifest:
    """The content of factorctl.json; docs/manifest.md explains every field to a reader."""

    kind: str
    """`native` for a factored checkpoint, `export` for what stock engines run."""
    stage: str
    """The verb that made it: factorize, finetune or export."""
    tool_version: str
    source: Mapping[str, Any]
    """The dense model: id, kind, resolved revision, files with their hashes."""
    factored: Mapping[str, Any]
    """Sizes, gate, scale, K and notation of the factored FFNs."""
    parent: str | None = None
    """sha256 of the parent artefact's manifest; None where the parent is the dense source."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The full resolved configuration of the verb."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What the verb found: strategy, per-layer permutation hashes, identity check, calibration, losses."""
    libraries: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, FileRecord] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The file, sealed by its own sha256."""
        return dump_sealed(self._content())

    @property
    def sha256(self) -> str:
        """The seal: sha256 of everything else in the file. What a child names as its parent."""
        return seal_of(self._content())

    @property
    def total_bytes(self) -> int:
        """Size of all files but this one."""
        return sum(record.size for record in self.files.values())

    def _content(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write factorctl.json: the commit point of the artefact."""
    write_file(directory / MANIFEST_NAME, manifest.to_bytes())


def is_artefact(directory: Path) -> bool:
    return os.path.isfile(directory / MANIFEST_NAME)


def named_like(path: Path) -> str | None:
    """The hint that names the artefact beside `path` whose name is nearest to it; None where none is near."""
    close = difflib.get_close_matches(path.name, [beside.name for beside in _artefacts(path.parent)], n=1)
    return f"did you mean {path.parent / close[0]}?" if close else None


def _checkpoints_in(directory: Path) -> str | None:
    inside = [str(artefact) for artefact in _artefacts(directory)]
    return f"name one of those in it: {', '.join(inside)}" if inside else None


def _artefacts(directory: Path) -> list[Path]:
    """Artefacts that lie in a directory, by name; none where it cannot be listed."""
    try:
        return sorted(path for path in directory.iterdir() if not path.name.startswith(".") and is_artefact(path))
    except (OSError, ValueError):  # a name that no file system takes is a ValueError
        return []


def read_manifest(directory: Path) -> Manifest:
    """The manifest of an artefact directory, every field checked.

    Raises:
        UsageError: this directory is no factorctl artefact, or a newer version wrote it.
        IntegrityError: the manifest is damaged.
    """
    if not os.path.isdir(directory):  # Path.is_dir raises for names that no file system takes
        fault = "is a file, not a checkpoint directory" if os.path.exists(directory) else "does not exist"
        raise UsageError(
            f"{directory} {fault}", named_like(directory) or "make a checkpoint with `factorctl factorize`"
        )
    if not is_artefact(directory):
        raise UsageError(
            f"{directory} holds no {MANIFEST_NAME}: it is not a complete factorctl checkpoint",
            _checkpoints_in(directory)
            or "make one with `factorctl factorize MODEL`, of this one if it is a dense model; an interrupted run is "
            "finished by running the same command again",
        )
    path = regular_file(directory, MANIFEST_NAME, origin="the checkpoint")
    raw = read_json_object(path)
    version = raw.pop("schema_version", None)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise IntegrityError(f"{path} has no schema_version")
    if version > SCHEMA_VERSION:
        raise UsageError(
            f"{path} has schema {version}, written by factorctl {str(raw.get('tool_version'))[:40]}",
            f"this version reads schema {SCHEMA_VERSION}: upgrade factorctl",
        )
    seal = raw.pop(SEAL, None)
    manifest = _checked(raw, path)
    if seal is not None and seal != manifest.sha256:  # the first manifests had none
        raise IntegrityError(
            f"{path} is damaged: its content has sha256 {manifest.sha256}, it says {str(seal)[:80]}", _RESTORE
        )
    return manifest


def _checked(raw: dict[str, Any], path: Path) -> Manifest:
    def expect(name: str, kind: type | tuple[type, ...]) -> Any:
        if not isinstance(raw.get(name), kind):
            raise IntegrityError(f"{path}: field {name!r} is missing or of the wrong type")
        return raw[name]

    names = {"kind", "stage", "tool_version", "source", "factored", "parent", "config", "details", "libraries", "files"}
    if unknown := sorted(raw.keys() - names):
        raise IntegrityError(f"{path}: unknown field {unknown[0][:80]!r}")
    parent = raw.get("parent")
    if parent is not None and not (isinstance(parent, str) and _SHA256.fullmatch(parent)):
        raise IntegrityError(f"{path}: field 'parent' is no sha256")
    manifest = Manifest(
        kind=expect("kind", str),
        stage=expect("stage", str),
        tool_version=expect("tool_version", str),
        source=expect("source", dict),
        factored=expect("factored", dict),
        parent=parent,
        config=expect("config", dict),
        details=expect("details", dict),
        libraries=expect("libraries", dict),
        files={
            artefact_name(name, origin=str(path)): _record(name, value, path)
            for name, value in expect("files", dict).items()
        },
    )
    _check_fields(raw, str(path))
    return manifest


def _record(name: str, value: Any, path: Path) -> FileRecord:
    if isinstance(value, dict) and value.keys() == {"sha256", "size"}:
        sha256, size = value["sha256"], value["size"]
        size_is_sane = isinstance(size, int) and not isinstance(size, bool) and 0 <= size <= MAX_FILE_SIZE
        if isinstance(sha256, str) and _SHA256.fullmatch(sha256) and size_is_sane:
            return FileRecord(sha256=sha256, size=size)
    raise IntegrityError(f"{path}: the record of file {name!r} needs a sha256 and a size")


def _check_fields(raw: Mapping[str, Any], origin: str) -> None:
    """Check the inner fields of a manifest whose outer ones are of the right types.

    Raises:
        IntegrityError: naming the first field that is missing, of the wrong type or out of all proportion.
    """
    for part, fields in REQUIRED_FIELDS.items():
        _check(raw[part], fields, part, origin, optional=False)
    for part, fields in OPTIONAL_FIELDS.items():
        _check(raw[part], fields, part, origin, optional=True)
    if calibration := raw["details"].get("calibration"):
        _check(calibration, CALIBRATION_FIELDS, "details.calibration", origin, optional=False)
    for index, layer in enumerate(raw["details"].get("layers") or []):
        if not isinstance(layer, dict) or not isinstance(layer.get("refit", {}), dict):
            raise IntegrityError(f"{origin}: field 'details.layers' has a damaged record {index}")
    for name in raw["source"]["files"]:
        if not name or "/" in name.removeprefix(f"{TEMPLATES}/") or "\0" in name or name in (".", ".."):
            raise IntegrityError(f"{origin}: field 'source.files' names {name[:120]!r}, which is no plain file name")
    for name, version in raw["libraries"].items():
        if not isinstance(version, str):
            raise IntegrityError(f"{origin}: field 'libraries.{name[:80]}' is of the wrong type")


def _check(part: Mapping[str, Any], fields: Mapping[str, _Types], where: str, origin: str, *, optional: bool) -> None:
    for name, types in fields.items():
        value = part.get(name)
        if value is None and optional:
            continue
        if not isinstance(value, types) or isinstance(value, bool):
            raise IntegrityError(f"{origin}: field '{where}.{name}' is missing or of the wrong type")
        if isinstance(value, (int, float)) and abs(value) > LARGEST_NUMBER:
            raise IntegrityError(f"{origin}: field '{where}.{name}' is out of range")


def check_files(directory: Path, manifest: Manifest, *, hashes: bool = True) -> Iterable[str]:
    """Yield each file's name once it is found whole.

    Raises:
        IntegrityError: a file is missing, of another size or content, or shards lie here that the manifest does
            not know.
    """
    known = manifest.files.keys() | {MANIFEST_NAME}
    extra = sorted(path.name for path in directory.glob("*.safetensors") if path.name not in known)
    if extra:
        raise IntegrityError(f"{directory / extra[0]} is not in the manifest", "remove it if you put it there")
    for name, record in sorted(manifest.files.items()):
        path = regular_file(directory, name, origin=MANIFEST_NAME)
        size = path.stat().st_size
        if size != record.size:
            raise IntegrityError(f"{path} has {size} bytes; its manifest says {record.size}", _RESTORE)
        if hashes and (found := hash_file(path).sha256) != record.sha256:
            raise IntegrityError(f"{path} has sha256 {found}; its manifest says {record.sha256}", _RESTORE)
        yield name


_RESTORE = "the file is damaged: restore it from a copy, or make the checkpoint again"
