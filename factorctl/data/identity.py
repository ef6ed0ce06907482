"""What decides the content of token blocks, as plain JSON: hashes of the text and of the tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from factorctl.data.spec import DataSpec, FileSource, HubSource, TextSource
from factorctl.errors import UsageError
from factorctl.progress import Progress

_CHUNK_BYTES = 1 << 20


def identify_sources(spec: DataSpec, sampler_fingerprint: str | None, progress: Progress) -> list[dict[str, Any]]:
    """One record per source: the sha256 of every file, the commit of a Hub dataset, the model behind `self`.

    Hub revisions must be pinned before. No record holds an absolute path, so a moved folder stays the same text.
    """
    total = sum(
        _size(source.root / f) for source in spec.sources if isinstance(source, FileSource) for f in source.files
    )
    with progress.stage("Hashing text", total=total, unit="B") as task:
        return [
            {**_identify(source, sampler_fingerprint, task.advance), "weight": weight}
            for source, weight in zip(spec.sources, spec.weights, strict=True)
        ]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over all that turns text into ids: vocabulary, merges, pre-tokenizer, special and added tokens, and the
    chat template.

    The padding and truncation of a fast tokenizer are left out: they are the state of its last call, not its content.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: dict[str, Any] = {"special": {k: str(v) for k, v in sorted(tokenizer.special_tokens_map.items())}}
    if tokenizer.chat_template is not None:
        content["chat_template"] = tokenizer.chat_template
    if backend is None:
        content["vocabulary"] = sorted(tokenizer.get_vocab().items())
    else:
        content |= {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
    return hash_json(content)


def hash_json(content: Mapping[str, Any] | Sequence[Any]) -> str:
    """sha256 (hex) of the canonical JSON of `content`."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _identify(source: TextSource, sampler_fingerprint: str | None, advance: Any) -> dict[str, Any]:
    if isinstance(source, FileSource):
        files = [{"name": name, **_hash_file(source.root / name, advance)} for name in source.files]
        return {"kind": "files", "files": files} | _rows(source)
    if isinstance(source, HubSource):
        pinned = {"kind": "hub", "repo": source.repo, "config": source.config, "revision": source.revision}
        return pinned | _rows(source)
    return {"kind": "self", "sampler": sampler_fingerprint}


def _rows(source: FileSource | HubSource) -> dict[str, Any]:
    return {} if source.rows is None else {"rows": str(source.rows)}


def _hash_file(path: Path, advance: Any) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
                advance(len(chunk))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    return {"sha256": digest.hexdigest(), "bytes": size}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
