"""`factorctl.load`: a native checkpoint as a transformers model, with every tensor accounted for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from factorctl.checkpoint.manifest import Manifest, check_files, read_manifest
from factorctl.checkpoint.reader import CheckpointReader
from factorctl.config.shape import ScaleRule
from factorctl.errors import IntegrityError, UsageError
from factorctl.ffn.slicing import FactoredTensors
from factorctl.ffn.spec import MODEL_TYPE, FactoredSpec
from factorctl.files.strict_json import read_json_object
from factorctl.models.building import empty_dense_model, empty_factored_model, factored_ffns, stored_choices
from factorctl.models.domains import choose_by_domain, domains_of
from factorctl.models.families import DenseModel, dense_model, ffn_prefix, read_dense_model
from factorctl.models.filling import adopt_generation_config, fill
from factorctl.models.quantised.loading import load_quantised


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
    if (domains := domains_of(model)) is not None:
        choose_by_domain(model, domains, _legal(stored_choices(model), spec, path), factored_ffns(model))
    for ffn in factored_ffns(model):
        ffn.keep_experts_together()
    adopt_generation_config(model, checkpoint.path)
    return model


def _legal(experts_LMK: list[torch.Tensor], spec: FactoredSpec, path: Path) -> list[torch.Tensor]:
    """Every domain's experts, none of them twice, all there.

    Raises:
        IntegrityError: a table names an expert that is not there, or one twice.
    """
    for layer, experts_MK in enumerate(experts_LMK):
        for row in experts_MK.tolist():
            if len(set(row)) < len(row) or not 0 <= min(row) <= max(row) < spec.shape.num_experts:
                raise IntegrityError(f"{path}: layer {layer} gives a domain the experts {row}, which cannot be")
    return experts_LMK


def _load_export(
    path: Path,
    *,
    top_k: int | None,
    scale: ScaleRule | None,
    dtype: torch.dtype | None,
    device: torch.device | str,
    verify: bool,
) -> PreTrainedModel:
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
