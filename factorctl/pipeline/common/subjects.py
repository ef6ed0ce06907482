"""The two models that are compared: found, checked and hashed first; loaded one at a time, in the same dtype, later."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from factorctl.checkpoint.manifest import Manifest, check_files, is_artefact, read_manifest
from factorctl.checkpoint.sources import Source
from factorctl.errors import IntegrityError, UsageError, in_one_line
from factorctl.ffn.spec import MODEL_TYPE
from factorctl.files.hashing import hash_value
from factorctl.files.strict_json import read_json_object
from factorctl.models.families import FAMILIES
from factorctl.models.loading import NativeCheckpoint, load, load_dense, open_checkpoint
from factorctl.pipeline.common.dense_source import find_source
from factorctl.pipeline.common.recorded_source import describe_source, find_recorded_source
from factorctl.pipeline.common.tokenizers import has_tokenizer, load_tokenizer
from factorctl.pipeline.common.workspace import newest_checkpoint
from factorctl.progress import Progress


@dataclass(frozen=True)
class ComparedModel:
    """One of the two; no weight of it is read yet."""

    path: Path
    id: str
    kind: Literal["native", "export", "dense"]
    """`dense` is any Hugging Face directory that is no artefact of ours."""
    sha256: str
    """Of the manifest, which covers every file, or over the hashes of the files that decide a result."""
    context: int | None
    """Positions that the model knows."""
    vocabulary: int
    """Rows of its embedding."""
    source: Source | None = None
    """Where a `dense` model was found."""
    description: Mapping[str, Any] | None = None
    """The source as a manifest describes it: id and the hash of every file."""
    native: NativeCheckpoint | None = None
    manifest: Manifest | None = None


class NamesModels(Protocol):
    """The part of a config that says which two models are meant."""

    @property
    def checkpoint(self) -> str | None: ...

    @property
    def against(self) -> str | None: ...

    @property
    def workspace(self) -> Path: ...


def find_checkpoint(config: NamesModels, progress: Progress) -> ComparedModel:
    """The model that is held against another, every file of an artefact verified.

    Raises:
        UsageError: there is none.
        IntegrityError: a file is not what its manifest says.
    """
    if config.checkpoint is not None:
        return find_model(config.checkpoint, progress)
    newest = newest_checkpoint(config.workspace)
    progress.note(f"no checkpoint was named; taking the newest, {newest}")
    return find_model(str(newest), progress)


def find_reference(config: NamesModels, model: ComparedModel, progress: Progress) -> ComparedModel:
    """What `model` is compared with: `--against`, else the dense source that its manifest records.

    Raises:
        UsageError: nobody says what to compare with, or the source is not found, or is another model by now.
    """
    if config.against is not None:
        return find_model(config.against, progress)
    if model.manifest is None:
        raise UsageError(
            f"{model.path} does not say what it was made from", "name what it is compared with: --against MODEL"
        )
    known = model.manifest.source
    hint = "name the dense model with --against MODEL"
    wanted_for = f"the model is compared with its dense source {known['id']}"
    source = find_recorded_source(known, progress, wanted_for=wanted_for, hint=hint)
    reference = _plain(source, progress, known_as=str(known["id"]))
    if not is_source_of(model, reference):
        raise UsageError(
            f"{source.path} is not the dense model that {model.path} was made from ({known['id']}): its weights have "
            "other hashes than the manifest records",
            hint,
        )
    return reference


def is_source_of(model: ComparedModel, reference: ComparedModel) -> bool:
    """Whether the manifest of `model` names the weights of `reference`, by their hashes."""
    if model.manifest is None or reference.description is None:
        return False
    recorded, found = model.manifest.source["files"], reference.description["files"]
    names = [name for name in recorded if name.endswith(".safetensors")]
    return bool(names) and all(found.get(name) == dict(recorded[name]) for name in names)


def find_model(name: str, progress: Progress) -> ComparedModel:
    """A native checkpoint, an export, or what `MODEL` means elsewhere: directory, .gguf file, alias, Hub id.

    Raises:
        UsageError: nothing of that name, or a form that is not run here.
        IntegrityError: a file is not what its manifest says.
    """
    path = Path(name).expanduser()
    if os.path.isdir(path):
        if is_artefact(path):
            return _artefact(path, progress)
        if (path / "config.json").is_file() and read_json_object(path / "config.json").get("model_type") == MODEL_TYPE:
            read_manifest(path)  # says what an unfinished checkpoint is
    return _plain(find_source(name, progress), progress)


def _artefact(path: Path, progress: Progress) -> ComparedModel:
    manifest = read_manifest(path)
    with progress.stage(f"Verifying {path.name}", total=len(manifest.files), unit="files") as task:
        for _ in check_files(path, manifest):
            task.advance()
    if manifest.kind == "native":
        native = open_checkpoint(path, verify=False)
        return ComparedModel(
            path,
            path.name,
            "native",
            manifest.sha256,
            **_sizes(native.dense.config),
            native=native,
            manifest=manifest,
        )
    if manifest.details.get("format") == "gguf":
        raise UsageError(
            f"{path} is a GGUF export, which transformers does not run",
            "evaluate the native checkpoint it was made from: the export was compared with it before it was published",
        )
    return ComparedModel(path, path.name, "export", manifest.sha256, **_sizes(_read_config(path)), manifest=manifest)


def _plain(source: Source, progress: Progress, *, known_as: str | None = None) -> ComparedModel:
    for note in source.notes:
        progress.note(note)
    with progress.stage(f"Hashing {source.id}"):
        description = describe_source(source)
    return ComparedModel(
        source.path,
        known_as or source.id,
        "dense",
        hash_value(description["files"]),
        **_sizes(_read_config(source.path)),
        source=source,
        description=description,
    )


def _read_config(directory: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(directory)
    except Exception as error:  # transformers checks configs with many exception types of its own
        raise UsageError(
            f"{directory / 'config.json'} describes no model that transformers knows: {in_one_line(error)}",
            "give a checkpoint of a causal language model",
        ) from error


def _sizes(config: Any) -> dict[str, Any]:
    text = config.get_text_config()
    return {"context": getattr(text, "max_position_embeddings", None), "vocabulary": int(text.vocab_size)}


def load_model(
    model: ComparedModel, *, dtype: torch.dtype, device: torch.device, top_k: int | None = None
) -> PreTrainedModel:
    """The model in memory, ready to score; `top_k` only for a native checkpoint.

    Raises:
        IntegrityError: a tensor is missing, unexpected, misshaped or unreadable.
    """
    if model.kind == "native":
        return load(model.path, top_k=top_k, dtype=dtype, device=device, verify=False)
    if model.kind == "dense" and is_plain_dense(model.path):
        return load_dense(model.path, dtype=dtype, device=device)
    return load_stock(model.path, dtype, device)


def is_plain_dense(directory: Path) -> bool:
    """Whether factorctl itself can build the model there: a family of the table, unquantised."""
    raw = read_json_object(directory / "config.json")
    return raw.get("model_type") in FAMILIES and "quantization_config" not in raw


def load_stock(directory: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """What transformers makes of a directory, accepted only if no tensor was left out or made up.

    Raises:
        IntegrityError: it cannot be loaded, or not all of it.
    """
    loading: Any = AutoModelForCausalLM.from_pretrained  # typed as if it returned the model alone
    try:
        model, info = loading(directory, dtype=dtype, use_safetensors=True, output_loading_info=True)
    except Exception as error:  # transformers raises what it likes for a damaged directory
        raise IntegrityError(f"transformers cannot load {directory}: {in_one_line(error)}") from error
    for fault in ("missing_keys", "mismatched_keys"):
        if info.get(fault):
            raise IntegrityError(f"{directory}: {fault.replace('_', ' ')}: {sorted(map(str, info[fault]))[0]}")
    loaded: PreTrainedModel = model.to(device).eval().requires_grad_(False)
    return loaded


def shared_tokenizer(model: ComparedModel, reference: ComparedModel) -> PreTrainedTokenizerBase:
    """The one tokenizer that both models are given text with.

    Raises:
        UsageError: neither has one, or their vocabularies differ.
    """
    ours, theirs = _tokenizer(model), _tokenizer(reference)
    tokenizer = ours or theirs
    if tokenizer is None:
        raise UsageError(f"{model.path} has no tokenizer", "put the model's tokenizer files there")
    if ours is not None and theirs is not None:
        _refuse_other_vocabulary(model, ours, reference, theirs)
    largest = max(tokenizer.get_vocab().values())
    for one in (model, reference):
        if largest >= one.vocabulary:
            raise UsageError(
                f"the tokenizer gives ids up to {largest}; {one.path} has embeddings for {one.vocabulary} tokens",
                "models with different vocabularies cannot be compared: name its own dense source with --against",
            )
    return tokenizer


def _refuse_other_vocabulary(
    model: ComparedModel, ours: PreTrainedTokenizerBase, reference: ComparedModel, theirs: PreTrainedTokenizerBase
) -> None:
    mine, other = ours.get_vocab(), theirs.get_vocab()
    if mine == other:
        return
    token = min((mine.items() ^ other.items()), key=lambda item: (item[1], item[0]))[0]
    raise UsageError(
        f"{model.path} and {reference.path} have different vocabularies ({len(mine):,} and {len(other):,} tokens): "
        f"token {token!r} has id {mine.get(token, 'none')} in the one and {other.get(token, 'none')} in the other",
        "per-token figures over different tokens cannot be compared: name its own dense source with --against",
    )


def _tokenizer(model: ComparedModel) -> PreTrainedTokenizerBase | None:
    if not has_tokenizer(model.path):
        return None
    config = model.native.dense.config if model.native is not None else None
    hint = "put the model's own tokenizer files there"
    return load_tokenizer(model.path, hint=hint, config=config, rows=model.vocabulary)
