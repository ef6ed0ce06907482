"""A GGUF file in the model's place: found, verified, and held against the dense model's vocabulary."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from gguf import TokenType
from transformers import PreTrainedTokenizerBase

from factorctl.checkpoint.gguf.header import GgufHeader, read_gguf_header
from factorctl.checkpoint.manifest import Manifest, check_files, is_artefact, read_manifest
from factorctl.config.common import Device
from factorctl.errors import IntegrityError, UsageError
from factorctl.exporting.check.llama_cpp import require_llama_cpp
from factorctl.exporting.gguf.file import GGUF_NAME
from factorctl.files.first_bytes import is_gguf
from factorctl.files.hashing import hash_file
from factorctl.pipeline.common.subjects import ComparedModel
from factorctl.progress import Progress


@dataclass(frozen=True)
class GgufModel:
    """A GGUF file that llama.cpp is to run."""

    file: Path
    header: GgufHeader
    sha256: str
    """Of the export's manifest, else of the file."""
    manifest: Manifest | None
    """Of the export that the file lies in; None for a file of another origin."""

    @property
    def tokens(self) -> list[str]:
        return [str(token) for token in self.header.keys["tokenizer.ggml.tokens"]]

    @property
    def context(self) -> int:
        return int(self.header.keys[f"{self.header.architecture}.context_length"])

    def as_model(self) -> ComparedModel:
        """As the other verbs see a model."""
        return ComparedModel(
            self.file,
            self.file.name,
            "export",
            self.sha256,
            self.context,
            len(self.tokens),
            manifest=self.manifest,
        )


def find_gguf(name: str | None, progress: Progress) -> GgufModel | None:
    """The file that `name` means: itself, or the one in a GGUF export; None where `name` means something else.

    Raises:
        UsageError: llama.cpp is not at hand, or the file holds no language model.
        IntegrityError: the export is damaged.
    """
    if name is None:
        return None
    path = Path(name).expanduser()
    if os.path.isdir(path):
        if not is_artefact(path) or read_manifest(path).details.get("format") != "gguf":
            return None
        path = path / GGUF_NAME
    elif not (os.path.isfile(path) and is_gguf(path)):
        return None
    require_llama_cpp()
    home = path.parent
    manifest = read_manifest(home) if is_artefact(home) else None
    if manifest is not None and path.name in manifest.files:
        with progress.stage(f"Verifying {home.name}", total=len(manifest.files), unit="files") as task:
            for _ in check_files(home, manifest):
                task.advance()
        return _checked(path, manifest.sha256, manifest)
    with progress.stage(f"Hashing {path.name}"):
        sha256 = hash_file(path).sha256
    return _checked(path, sha256, None)


def _checked(path: Path, sha256: str, manifest: Manifest | None) -> GgufModel:
    header = read_gguf_header(path)
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type", f"{header.architecture}.context_length"):
        if key not in header.keys:
            raise UsageError(f"{path} lacks the key {key}: llama.cpp cannot continue a text with it", "export it again")
    return GgufModel(path, header, sha256, manifest)


def require_the_cpu(gguf: GgufModel, device: Device) -> None:
    """Raises:
    UsageError: another device was asked for.
    """
    if device == "cuda":
        raise UsageError(
            f"{gguf.file} is run by llama.cpp, here on the CPU alone",
            "leave out --device, or try the native checkpoint",
        )


def require_same_vocabulary(gguf: GgufModel, tokenizer: PreTrainedTokenizerBase, dense: Path) -> None:
    """Hold every ordinary token of the file against the dense model's: both are given the same ids.

    Raises:
        UsageError: the file is one of another model.
    """
    theirs, types = gguf.tokens, gguf.header.keys["tokenizer.ggml.token_type"]
    if len(types) != len(theirs):
        raise IntegrityError(f"{gguf.file} has {len(theirs)} tokens and {len(types)} types of them", "export it again")
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if index < len(theirs) and (types[index] != TokenType.NORMAL or theirs[index] == token):
            continue
        found = repr(theirs[index]) if index < len(theirs) else "no token"
        raise UsageError(
            f"{gguf.file} is a file of another model than {dense}: its token {index} is {found}, there it is {token!r}",
            "name the dense model that it was made from: --against MODEL",
        )
