"""A dense .gguf file as a Hugging Face directory: dequantised exactly once, cached by the file's hash."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from factorctl.checkpoint.gguf.families import config_settings, family_of
from factorctl.checkpoint.gguf.header import GIVE_HF, GgufHeader, read_gguf_header
from factorctl.checkpoint.gguf.vocabulary import end_tokens, write_tokenizer
from factorctl.checkpoint.gguf.weights import GgufWeights, account_for_tensors
from factorctl.checkpoint.writer import shard_name, write_index, write_shard
from factorctl.errors import UsageError, in_one_line
from factorctl.files.first_bytes import is_gguf, refuse_as_model
from factorctl.files.hashing import hash_file
from factorctl.files.publishing import (
    OF_CACHES,
    cache_entry,
    require_disk_space,
    sole_writer,
    writable,
    write_file,
)
from factorctl.files.strict_json import dump_json
from factorctl.progress import Progress

READING = 3
"""Version of how GGUF files are read: what an older one left in the cache is not taken."""
TYPES_NAME = "tensor-types.txt"
"""In a copy: what its GGUF file was stored as, in words."""

GgufCheck = Callable[[Path, Path, Progress], str]
"""A second opinion on (the file, what was read from it) before that is kept; returns a remark, raises what it finds."""


@dataclass(frozen=True)
class Dequantised:
    """A GGUF file as the rest of the program reads models."""

    directory: Path
    """float32 safetensors, config and tokenizer."""
    sha256: str
    """Of the GGUF file."""
    notes: tuple[str, ...]


def dequantised(path: Path, *, cache: Path, check: GgufCheck | None, progress: Progress) -> Dequantised:
    """The Hugging Face directory of `path`, made where the cache has none yet.

    Raises:
        UsageError: a key, tensor or token of the file has no exact counterpart in transformers.
        IntegrityError: the file lacks a tensor, or `check` found that it computes something else.
    """
    if not is_gguf(path):
        raise refuse_as_model(path)
    sha256 = hash_file(path).sha256
    home, remarks = cached_copy(sha256, cache), list[str]()
    if not home.exists():  # a finished cache entry is used without a lock, also where it cannot be written
        with sole_writer(home, wait=True):
            if not home.exists():
                remarks = _convert(read_gguf_header(path), home, check, progress)
    note = f"{path.name} holds {_types(home, path)} weights: dequantised once to float32, kept in {home}"
    return Dequantised(home, sha256, (note, *remarks))


def _types(home: Path, path: Path) -> str:
    """What the file's tensors are stored as. Its copy remembers: a header with a vocabulary takes seconds to read."""
    try:
        return (home / TYPES_NAME).read_text(encoding="utf-8")
    except OSError:
        return _named_types(read_gguf_header(path))


def _named_types(header: GgufHeader) -> str:
    return ", ".join(header.tensor_types)


def cached_copy(sha256: str, cache: Path) -> Path:
    """Where the cache keeps what was read from the GGUF file of this hash."""
    return cache / "gguf" / f"{sha256[:16]}-{READING}"


def _convert(header: GgufHeader, home: Path, check: GgufCheck | None, progress: Progress) -> list[str]:
    weights, types = _weights(header), _named_types(header)
    require_disk_space(home.parent, weights.num_bytes)
    with writable(home, OF_CACHES), cache_entry(home) as partial:
        remarks = write_tokenizer(header, partial)
        _write_config(header, weights.config, partial)
        _write_weights(weights, partial, f"Dequantising {header.path.name} ({types}) to float32", progress)
        write_file(partial / TYPES_NAME, types.encode())
        if check is not None:
            remarks.append(check(header.path, partial, progress))
    return remarks


def _weights(header: GgufHeader) -> GgufWeights:
    """Every key and tensor accounted for, before a value is read."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    family = family_of(header)
    settings = config_settings(header, family)
    try:
        config: Any = AutoConfig.for_model(**settings)  # type: ignore[arg-type]
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers and torch find contradictions anywhere on the way
        raise UsageError(
            f"the keys of {header.path} describe no {family.model_type} model: {in_one_line(error)}", GIVE_HF
        ) from error
    config.architectures = [type(model).__name__]
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    return account_for_tensors(header, family, config, shapes)


def _write_config(header: GgufHeader, config: Any, directory: Path) -> None:
    write_file(directory / "config.json", dump_json(config.to_diff_dict()))
    ends = end_tokens(header)
    generation: Mapping[str, object] = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": config.pad_token_id,
    }
    stated = {name: value for name, value in generation.items() if value is not None}
    write_file(directory / "generation_config.json", dump_json({"_from_model_config": False, **stated}))


def _write_weights(weights: GgufWeights, directory: Path, title: str, progress: Progress) -> None:
    """One shard for each layer and one for the rest, so that no more than a layer is in memory."""
    placed: dict[str, str] = {}
    with progress.stage(title, total=weights.num_units, unit="layer") as task:
        for index, tensors in enumerate(weights.units()):
            shard = shard_name(index, weights.num_units)
            write_shard(directory / shard, tensors)
            placed |= dict.fromkeys(tensors, shard)
            task.advance()
    write_index(directory, placed, weights.num_bytes)
