"""The form that a checkpoint takes for a target: its tensors, its config.json, and what it then has to equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from factorctl.checkpoint.reader import CheckpointReader
from factorctl.config.export import ExportConfig
from factorctl.exporting.check.comparison import Fidelity
from factorctl.exporting.features import features_of
from factorctl.exporting.gguf.tensors import PLAIN_QUANTS, GgufLayout, chosen_quant
from factorctl.exporting.stock.architecture import Architecture
from factorctl.exporting.stock.bnb import BnbLayout, quantization_config
from factorctl.exporting.stock.choice import (
    architecture_for,
    becomes_mixture,
    blockers,
    gguf_architecture,
    graph_of,
    needs_router_scaling,
)
from factorctl.exporting.stock.config import stock_config
from factorctl.exporting.stock.dense import DenseLayout, dense_config
from factorctl.exporting.stock.folding import Folding, folded_scale, is_power_of_two
from factorctl.exporting.stock.padding import FRIENDLY, StockSizes, filled_up, sizes_of
from factorctl.exporting.stock.shards import Layout
from factorctl.exporting.stock.tensors import NativeUnits, StockLayout
from factorctl.ffn.paths import can_group
from factorctl.models.loading import NativeCheckpoint
from factorctl.models.quantised.storage import Bits, fused_config, storage_name

EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Form:
    """One checkpoint in the form of one target."""

    container: Literal["safetensors", "gguf"]
    architecture: str
    layout: Layout
    config: dict[str, Any]
    """config.json; empty for a GGUF, which carries its own."""
    dtype: str
    """Of the stored weights; of a GGUF its storage type."""
    top_k: int
    """Active experts of the native model that this form equals: all of them for `--to dense`."""
    fidelity: Fidelity
    scores: Literal["softmax", "sigmoid"] = "softmax"
    """What of the router's logits is normalised over the chosen experts."""
    sizes: StockSizes | None = None
    """Neurons of its experts and its shared MLP, padding included; None for a dense model."""
    unpadded: StockSizes | None = None
    """The same without neurons of zeros."""
    quantised_experts: str | None = None
    """How routed experts are stored where that takes `factorctl.load` to load them: `nf4` or `int8`."""


def form_for(
    checkpoint: NativeCheckpoint, config: ExportConfig, reader: CheckpointReader, shifts: Sequence[int] = ()
) -> Form:
    """The form of `config.target`.

    Args:
        shifts: per layer the power of two that the router is divided by, for gate `hard` at K > 1.
    """
    if config.target == "hf":
        return _stock_form(checkpoint, config, reader, shifts)
    if config.target == "gguf":
        return _gguf_form(checkpoint, config, reader, shifts)
    if config.target == "dense":
        return _dense_form(checkpoint, config, reader)
    bits: Bits = 4 if config.target == "bnb-4bit" else 8
    if becomes_mixture(config.target, checkpoint.spec):
        return _quantised(_stock_form(checkpoint, config, reader, shifts, fused=True), bits, experts=True)
    return _quantised(_dense_form(checkpoint, config, reader), bits, experts=False)


def stored_dtype(config: ExportConfig, reader: CheckpointReader) -> torch.dtype:
    """The dtype of the export's weights: the checkpoint's own unless `--dtype` names another."""
    return cast_to(config) or reader.entry(EMBEDDING).dtype


def cast_to(config: ExportConfig) -> torch.dtype | None:
    return None if config.dtype == "auto" else getattr(torch, config.dtype)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _native_units(checkpoint: NativeCheckpoint, reader: CheckpointReader) -> NativeUnits:
    return NativeUnits(checkpoint.dense, tuple(reader.entries))


def _has_own_head(arch: Architecture, config: ExportConfig) -> bool:
    """Whether a tied head is stored beside the embeddings all the same."""
    return config.untie_lm_head or not arch.ties_head


def _stock_form(
    checkpoint: NativeCheckpoint,
    config: ExportConfig,
    reader: CheckpointReader,
    shifts: Sequence[int],
    *,
    fused: bool = False,
) -> Form:
    dense, spec = checkpoint.dense, checkpoint.spec
    arch, dtype = architecture_for(dense, spec, config.arch), stored_dtype(config, reader)
    sizes = arch.sizes(spec.shape, _multiple(checkpoint, config, arch, dtype))
    folding = Folding(spec, arch.shared, cast_to(config), tuple(shifts), sizes)
    own_head = _has_own_head(arch, config)
    tied = bool(dense.config.tie_word_embeddings) and not own_head
    return Form(
        container="safetensors",
        architecture=arch.class_name,
        layout=StockLayout(_native_units(checkpoint, reader), arch, folding, own_head, fused),
        config=stock_config(dense, spec, arch, sizes, dtype=dtype_name(dtype), tied=tied),
        dtype=dtype_name(dtype),
        top_k=spec.shape.top_k,
        fidelity=fidelity_of_experts(checkpoint, config, reader),
        scores=arch.scores,
        sizes=sizes,
        unpadded=sizes_of(spec.shape, arch.shared),
    )


def _multiple(checkpoint: NativeCheckpoint, config: ExportConfig, arch: Architecture, dtype: torch.dtype) -> int:
    """What expert sizes are filled up to a multiple of: by default what `grouped_mm` cannot take as it is."""
    if config.pad_experts != "auto":
        return config.pad_experts
    own = sizes_of(checkpoint.spec.shape, arch.shared)
    return 1 if can_group(dtype, own.expert) else FRIENDLY


def _gguf_form(
    checkpoint: NativeCheckpoint, config: ExportConfig, reader: CheckpointReader, shifts: Sequence[int]
) -> Form:
    dense, spec = checkpoint.dense, checkpoint.spec
    arch, quant = gguf_architecture(dense, spec), chosen_quant(config.quant, stored_dtype(config, reader))
    in_blocks = quant not in PLAIN_QUANTS.values()
    multiple = (FRIENDLY if in_blocks else 1) if config.pad_experts == "auto" else config.pad_experts
    sizes = filled_up(sizes_of(spec.shape, arch.shared), multiple)
    folding = Folding(spec, arch.shared, cast_to(config), tuple(shifts), sizes)
    return Form(
        container="gguf",
        architecture=graph_of(arch).name,
        layout=GgufLayout(_native_units(checkpoint, reader), graph_of(arch), folding, config.untie_lm_head),
        config={},
        dtype=quant,
        top_k=spec.shape.top_k,
        fidelity=_gguf_fidelity(quant, fidelity_of_experts(checkpoint, config, reader), reader),
        sizes=sizes,
        unpadded=sizes_of(spec.shape, arch.shared),
    )


def _gguf_fidelity(quant: str, of_experts: Fidelity, reader: CheckpointReader) -> Fidelity:
    if quant.startswith(("q8", "q6")):
        return Fidelity.INT8
    if quant not in PLAIN_QUANTS.values():
        return Fidelity.INT4
    keeps = quant in ("f32", PLAIN_QUANTS[reader.entry(EMBEDDING).dtype])
    return of_experts if keeps else Fidelity.ROUNDED


def _dense_form(checkpoint: NativeCheckpoint, config: ExportConfig, reader: CheckpointReader) -> Form:
    dense, spec, dtype = checkpoint.dense, checkpoint.spec, stored_dtype(config, reader)
    changes_tie = bool(dense.config.tie_word_embeddings) and config.untie_lm_head
    named = None if config.dtype == "auto" else dtype_name(dtype)
    return Form(
        container="safetensors",
        architecture=str((dense.config.architectures or [type(dense.config).__name__])[0]),
        layout=DenseLayout(_native_units(checkpoint, reader), spec, cast_to(config), config.untie_lm_head),
        config=dense_config(dense.raw, spec, dtype=named, untied=changes_tie),
        dtype=dtype_name(dtype),
        top_k=0 if spec.shape.top_k == 0 else spec.shape.num_experts,
        fidelity=Fidelity.ROUNDED if _narrows(config, reader) else Fidelity.EXACT,
    )


def _quantised(form: Form, bits: Bits, *, experts: bool) -> Form:
    """A form in full precision with its large weights, and routed experts, as bitsandbytes stores them."""
    assert isinstance(form.layout, DenseLayout | StockLayout)
    loading = fused_config(bits) if experts else quantization_config(bits, form.dtype)
    judged = Fidelity.INT4 if bits == 4 else Fidelity.INT8
    return replace(
        form,
        layout=BnbLayout(form.layout, bits),
        config={**form.config, "quantization_config": loading},
        dtype=f"{storage_name(bits)} and {form.dtype}",
        fidelity=Fidelity.STEPS if experts else judged,
        quantised_experts=storage_name(bits) if experts else None,
    )


def fidelity_of_experts(checkpoint: NativeCheckpoint, config: ExportConfig, reader: CheckpointReader) -> Fidelity:
    """Exact while values are only multiplied by powers of two, or kept wider than 16 bits."""
    spec, layers = checkpoint.spec, range(checkpoint.dense.num_layers)
    folds_exactly = all(is_power_of_two(folded_scale(spec, layer)) for layer in layers)
    is_wide = stored_dtype(config, reader).itemsize > 2
    if needs_router_scaling(spec) or _narrows(config, reader) or not (folds_exactly or is_wide):
        return Fidelity.ROUNDED
    return Fidelity.EXACT


def _narrows(config: ExportConfig, reader: CheckpointReader) -> bool:
    """Whether `--dtype` rounds: to fewer bytes, or between the two 16-bit formats."""
    wanted, kept = cast_to(config), reader.entry(EMBEDDING).dtype
    return wanted is not None and wanted != kept and wanted.itemsize <= kept.itemsize


def remarks(checkpoint: NativeCheckpoint, config: ExportConfig) -> list[str]:
    """What the user should know of this form before relying on it."""
    dense, spec = checkpoint.dense, checkpoint.spec
    shape, features, notes = spec.shape, features_of(dense), []
    if config.target == "dense" and shape.routes:
        notes.append(f"all {shape.num_experts} experts are on in the dense model; the checkpoint runs {shape.top_k}")
    if config.target == "dense" and shape.top_k:
        if _is_changed(checkpoint):
            notes.append("the weights were trained or refitted: this is no longer the source's dense model")
        elif not is_untouched(checkpoint):
            notes.append("the weights are the source's, in another type than it stores them in")
    is_mixture = becomes_mixture(config.target, spec)
    if is_mixture and config.target.startswith("bnb"):
        engines = "" if blockers(dense, spec, "gguf") else "; for engines, --to gguf"
        notes.append(f"transformers alone cannot load quantised experts: load with factorctl.load{engines}")
    arch = _mixture_for(checkpoint, config) if is_mixture else None
    if arch is not None and arch.shared == "copied" and shape.shared_size:
        active = shape.top_k * (shape.shared_size + shape.expert_size) / shape.active_neurons
        notes.append(
            f"{arch.title} has no shared expert: the {shape.shared_size} shared neurons are copied into each of the "
            f"{shape.num_experts} experts, exactly, at {active:.2f} times the active neurons"
        )
    if config.target == "gguf" and features.window:
        notes.append(
            f"llama.cpp has no sliding window in this architecture: the context is cut to the window of "
            f"{features.window} tokens, within which the two are equal"
        )
    if is_mixture and needs_router_scaling(spec):
        notes.append("gate hard counts every chosen expert fully; stock routers come near that, not to it")
    return notes


def _mixture_for(checkpoint: NativeCheckpoint, config: ExportConfig) -> Architecture:
    if config.target == "gguf":
        return gguf_architecture(checkpoint.dense, checkpoint.spec)
    return architecture_for(checkpoint.dense, checkpoint.spec, config.arch)


def groups_experts(checkpoint: NativeCheckpoint, form: Form, dtype: torch.dtype) -> bool:
    """Whether transformers' default for experts (`grouped_mm`) takes this form: rows of a multiple of 16 bytes."""
    return form.sizes is None or can_group(dtype, checkpoint.dense.hidden_size, form.sizes.expert)


def gives_source_back(checkpoint: NativeCheckpoint, config: ExportConfig) -> bool:
    """Whether this export is the dense source again, bit for bit."""
    puts_together = config.target == "dense" and checkpoint.spec.shape.top_k > 0
    return puts_together and is_untouched(checkpoint) and config.dtype == "auto"


def is_untouched(checkpoint: NativeCheckpoint) -> bool:
    """Whether every FFN weight is the source's bit for bit: factorized, not cast, refitted or trained."""
    return checkpoint.manifest.config.get("dtype") == "auto" and not _is_changed(checkpoint)


def _is_changed(checkpoint: NativeCheckpoint) -> bool:
    """Whether FFN weights were refitted or trained."""
    manifest = checkpoint.manifest
    layers = manifest.details.get("layers") or []
    return manifest.stage != "factorize" or any(layer.get("refit", {}).get("kept") for layer in layers)
