"""`factorctl.load`: a native checkpoint as a transformers model, with every tensor accounted for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from factorctl.checkpoint.manifest import Manifest, check_files, read_manifest
from factorctl.checkpoint.reader import COMPUTED, CheckpointReader
from factorctl.config.common import ScaleRule
from factorctl.errors import IntegrityError, UsageError, in_one_line
from factorctl.ffn.few_token_linear import use_few_token_linears
from factorctl.ffn.slicing import FactoredTensors
from factorctl.ffn.spec import MODEL_TYPE, FactoredSpec
from factorctl.files.strict_json import read_json_object
from factorctl.models.building import empty_dense_model, empty_factored_model, factored_ffns
from factorctl.models.families import DenseModel, dense_model, ffn_prefix, read_dense_model


@dataclass(frozen=True)
class NativeCheckpoint:
    """A native checkpoint on disk, its manifest and configuration read and checked, its weights not yet."""

    path: Path
    manifest: Manifest
    dense: DenseModel
    spec: FactoredSpec


def open_checkpoint(path: Path, *, verify: bool = True) -> NativeCheckpoint:
    """Read manifest and config of a native checkpoint; with `verify`, hash every file.

    Raises:
        UsageError: no checkpoint here, or an export.
        IntegrityError: a file is not what the manifest says.
    """
    manifest = read_manifest(path)
    if manifest.kind != "native":
        raise UsageError(
            f"{path} is an export, not a native checkpoint",
            f"load it with {_loader_of(manifest)}, or give the checkpoint it was made from",
        )
    for _ in check_files(path, manifest, hashes=verify):
        pass
    unlisted = sorted({"config.json", *CheckpointReader(path).files} - manifest.files.keys())
    if unlisted:
        raise IntegrityError(f"{path / unlisted[0]} is not in the manifest")
    raw = read_json_object(path / "config.json")
    if raw.get("model_type") != MODEL_TYPE or not all(isinstance(raw.get(key), dict) for key in ("dense", "factored")):
        raise IntegrityError(f"{path / 'config.json'} is no factorctl config")
    dense = dense_model(raw["dense"], origin=str(path))
    spec = FactoredSpec.from_json(
        raw["factored"],
        num_layers=dense.num_layers,
        intermediate_size=dense.intermediate_size,
        origin=str(path / "config.json"),
    )
    return NativeCheckpoint(path, manifest, dense, spec)


def _loader_of(export: Manifest) -> str:
    return "factorctl.load" if holds_quantised_experts(export) else "transformers' AutoModelForCausalLM.from_pretrained"


def holds_quantised_experts(manifest: Manifest) -> bool:
    """Whether this is an export that stock `from_pretrained` refuses and `load` loads."""
    return manifest.kind == "export" and manifest.details.get("quantised_experts") is not None


def native_config(dense: DenseModel, spec: FactoredSpec) -> dict[str, object]:
    """config.json of a native checkpoint."""
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["FactoredForCausalLM"],
        "dense": dict(dense.raw),
        "factored": spec.to_json(),
        # transformers reads this file for the tokenizer's sake too, and warns of a model type that it does not know
        # unless a part of the file has the type that its base class has, which is none.
        "tokenizer": {"model_type": ""},
    }


def load(
    path: str | Path,
    *,
    top_k: int | None = None,
    scale: ScaleRule | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    verify: bool = True,
) -> PreTrainedModel:
    """A factored checkpoint as a transformers causal language model that `generate()`s with a KV cache.

    An export of routed experts by `--to bnb-4bit` or `--to bnb-8bit` is loaded as well: as the stock model class, its
    experts quantised in memory. Every other export loads with transformers alone.

    Args:
        path: a native checkpoint directory.
        top_k: another number of active experts than the checkpoint's; all of them is the dense model.
        scale: another scale rule; needed when scales were fitted for another `top_k`.
        dtype: cast floating-point tensors; by default they keep the dtype on disk.
        verify: check every file's sha256 first.

    Raises:
        UsageError: nothing here that `load` loads, or `top_k` does not fit.
        IntegrityError: a file or tensor is damaged, missing, unexpected or misshaped.

    Example:
        >>> model = factorctl.load("runs/demo-1R4E2K")
        >>> model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=20)
    """
    path = Path(path)
    if holds_quantised_experts(read_manifest(path)):
        return _load_export(path, top_k=top_k, scale=scale, dtype=dtype, device=device, verify=verify)
    checkpoint = open_checkpoint(path, verify=verify)
    spec = checkpoint.spec
    if top_k is not None or scale is not None:
        spec = spec.with_top_k(spec.shape.top_k if top_k is None else top_k, scale)
    model = empty_factored_model(checkpoint.dense, spec)
    fill(model, CheckpointReader(checkpoint.path), dtype=dtype, device=device)
    for ffn in factored_ffns(model):
        ffn.keep_experts_together()
    adopt_generation_config(model, checkpoint.path)
    return model


def _load_export(
    path: Path,
    *,
    top_k: int | None,
    scale: ScaleRule | None,
    dtype: torch.dtype | None,
    device: torch.device | str,
    verify: bool,
) -> PreTrainedModel:
    from factorctl.models.quantised.loading import load_quantised  # which imports this module

    if top_k is not None or scale is not None:
        raise UsageError(
            f"{path} is an export: its number of active experts and its scale are fixed",
            "load the checkpoint it was made from, or export that with another top_k",
        )
    for _ in check_files(path, read_manifest(path), hashes=verify):
        pass
    return load_quantised(path, dtype=dtype, device=device)


def load_dense(
    directory: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """A dense source as a transformers model, with the same strictness as `load`.

    Raises:
        IntegrityError: a tensor is damaged, missing, unexpected or misshaped.
    """
    model = empty_dense_model(read_dense_model(directory))
    fill(model, CheckpointReader(directory), dtype=dtype, device=device)
    adopt_generation_config(model, directory)
    return model


def read_factored_ffn(reader: CheckpointReader, layer: int) -> FactoredTensors:
    """The stored tensors of one factored FFN, by parameter name."""
    prefix = f"{ffn_prefix(layer)}."
    return {name.removeprefix(prefix): reader.read(name) for name in reader.entries if name.startswith(prefix)}


def adopt_generation_config(model: PreTrainedModel, directory: Path) -> None:
    """Take the defaults of `generate()` from the directory, where it has any.

    Raises:
        IntegrityError: the file is damaged.
    """
    if not (directory / "generation_config.json").is_file():
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(directory)
    except Exception as error:  # transformers checks it with exceptions of many types
        raise IntegrityError(
            f"{directory / 'generation_config.json'} cannot be read: {in_one_line(error)}", "fetch or make it again"
        ) from error


def fill(
    model: PreTrainedModel, reader: CheckpointReader, *, dtype: torch.dtype | None, device: torch.device | str
) -> None:
    """Give an empty model the reader's tensors; every one must be expected, every expected one be there.

    Raises:
        IntegrityError: naming the first tensor that is missing, unexpected or misshaped.
    """
    state = {}
    floats = {entry.dtype for entry in reader.entries.values() if entry.dtype.is_floating_point}
    if dtype is None and len(floats) > 1:  # products of two dtypes are none: all take that of the matrices
        dtype = reader.matrix_dtype
    for name in stored_tensors(model, reader):
        tensor = reader.read(name)
        state[name] = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
    adopt(model, state, device)


def adopt(model: PreTrainedModel, state: Mapping[str, torch.Tensor], device: torch.device | str) -> None:
    """Make tensors that were checked by `check_names`, and lie on `device`, the weights of an empty model."""
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    use_few_token_linears(model)
    model.to(torch.device(device))  # type: ignore[arg-type]  # buffers that no checkpoint holds, e.g. rotary frequencies
    model.requires_grad_(False)
    model.eval()
    model.config.dtype = next(model.parameters()).dtype


def stored_tensors(model: PreTrainedModel, reader: CheckpointReader) -> list[str]:
    """The tensors of `reader` that make up `model`: all of them, but for what old writers stored on top.

    That is rotary frequencies, which are computed, and a copy of tied embeddings as `lm_head.weight`.

    Raises:
        IntegrityError: naming the first tensor that is missing, unexpected or misshaped.
    """
    expected = expected_tensors(model)
    found = {name: entry.shape for name, entry in reader.entries.items() if not _is_surplus(name, expected)}
    _refuse_other_head(model, expected, found, reader.directory)
    check_names(expected, found, reader.directory)
    return sorted(found)


def _refuse_other_head(
    model: PreTrainedModel, expected: Mapping[str, object], found: Mapping[str, object], directory: Path
) -> None:
    """Say of a checkpoint what it is, where only its head is not that of a language model.

    Raises:
        UsageError: a classifier, a reward model, or a base model saved without its head.
    """
    missing, surplus = expected.keys() - found.keys(), found.keys() - expected.keys()
    stated = model.config.architectures
    named = ", ".join(map(str, stated)) if isinstance(stated, list) else ""
    of_layers = {name for name in missing | surplus if name.startswith("model.")}
    if of_layers or not missing <= {"lm_head.weight"}:
        return
    if surplus and (missing or (named and "CausalLM" not in named)):
        what = f"a {named}" if named and "CausalLM" not in named else "a model with another head"
        raise UsageError(
            f"{directory} holds {what}, no causal language model: it has tensor {min(surplus)}",
            "give the language model that it was made from",
        )
    if missing and not surplus:
        raise UsageError(
            f"{directory} lacks lm_head.weight and does not tie it to the embeddings: it was saved without its head, "
            "as AutoModel does",
            "save it from AutoModelForCausalLM, or set tie_word_embeddings in its config.json if the head is tied",
        )


def _is_surplus(name: str, expected: Mapping[str, tuple[int, ...]]) -> bool:
    return name.endswith(COMPUTED) or (name == "lm_head.weight" and name not in expected)


def expected_tensors(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what a checkpoint of this model must hold; tied weights stand once."""
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def check_names(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], directory: Path) -> None:
    """Compare names and shapes.

    Raises:
        IntegrityError: naming the first difference.
    """
    if missing := sorted(expected.keys() - found.keys()):
        raise IntegrityError(
            f"{directory} lacks tensor {missing[0]} ({len(missing)} missing)", "fetch or make it again"
        )
    if unexpected := sorted(found.keys() - expected.keys()):
        raise IntegrityError(f"{directory} holds tensor {unexpected[0]}, which its config has no place for")
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise IntegrityError(f"{directory}: tensor {name} has shape {tuple(found[name])}; its config says {shape}")
