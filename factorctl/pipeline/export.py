"""`export`: a native checkpoint in, a directory that stock engines load out, compared before it is published."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from factorctl import __version__
from factorctl.checkpoint.builder import ArtefactBuilder, building
from factorctl.checkpoint.hashing import hash_value
from factorctl.checkpoint.manifest import Manifest
from factorctl.checkpoint.publishing import refuse_existing, require_disk_space
from factorctl.checkpoint.reader import CheckpointReader
from factorctl.checkpoint.sources import Source
from factorctl.checkpoint.strict_json import dump_json
from factorctl.config import ExportConfig
from factorctl.errors import ResourceError
from factorctl.exporting.architectures import needs_router_scaling, refuse_blocked
from factorctl.exporting.card import CardFacts, export_card, licence_of
from factorctl.exporting.comparison import Agreement, compare
from factorctl.exporting.folding import scale_rounding
from factorctl.exporting.forms import Form, cast_to, dtype_name, form_for, is_untouched, remarks
from factorctl.exporting.hard_gate import FP16_MAX_SHIFT, MAX_SHIFT, RouterScaling, choose_shifts
from factorctl.exporting.native_reference import NativeReference, native_reference
from factorctl.exporting.shards import ShardPlan, plan_shards, write_shards
from factorctl.exporting.stock_reload import StockJob, ask_stock
from factorctl.exporting.verification_text import random_sequences, text_sequences
from factorctl.models.loading import NativeCheckpoint, open_checkpoint
from factorctl.pipeline.calibration_data import load_tokenizer
from factorctl.pipeline.devices import torch_device
from factorctl.pipeline.provenance import library_versions, peak_rss_bytes
from factorctl.pipeline.workspace import newest_checkpoint, output_path
from factorctl.progress import Progress

PROCESS_BYTES = 700_000_000
"""Resident size of the interpreter with torch and transformers loaded, before any weight."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class ExportPlan:
    """Everything that is decided before the first weight is read."""

    config: ExportConfig
    checkpoint: NativeCheckpoint
    source: Source
    """The native directory, whose tokenizer and licence files travel along."""
    out: Path
    form: Form
    shards: ShardPlan
    compute: torch.dtype
    """What the native and the exported model are compared in."""
    sequences: list[list[int]]
    has_tokenizer: bool
    memory_bytes: int
    notes: tuple[str, ...]

    @property
    def disk_bytes(self) -> int:
        return self.shards.total_bytes


@dataclass(frozen=True)
class Verified:
    """What the stock engine made of the export."""

    engine: str
    agreement: Agreement | None
    memory_bytes: int | None
    """What the engine held for the weights after loading."""


@dataclass(frozen=True)
class ExportResult:
    """What was made; the keys of `--format json`."""

    path: str
    checkpoint: str
    format: str
    architecture: str
    dtype: str
    notation: str
    engine: str
    """What the export was run in for the comparison."""
    tokens_compared: int
    max_logit_error: float | None
    top1_agreement: float | None
    kl: float | None
    scale_rounding: float | None
    """Largest relative rms error of a folded down-projection; 0 where no bit was lost."""
    selection_agreement: float | None
    """With gate `hard` at K > 1: share of tokens and layers that choose the same experts."""
    gate_error: float | None
    """With gate `hard` at K > 1: relative rms deviation of the gates from 1/K."""
    identical_to_source: bool | None
    """With `--to dense`: whether every weight is the source's, bit for bit."""
    files: int
    bytes: int
    memory_bytes: int | None
    commit: str | None
    """Hub commit, with `--push`."""
    seconds: float
    peak_rss_bytes: int
    notes: list[str] = field(default_factory=list)


def plan_export(config: ExportConfig, progress: Progress) -> ExportPlan:
    """Resolve and check all that can be checked without reading weights.

    Raises:
        UsageError: no checkpoint, or the target cannot hold it.
        ResourceError: disk or memory do not suffice.
    """
    path = config.checkpoint or newest_checkpoint(config.workspace)
    if config.checkpoint is None:
        progress.note(f"no checkpoint was named; taking the newest, {path}")
    with progress.stage("Hashing the checkpoint"):
        checkpoint = open_checkpoint(path)
    refuse_blocked(checkpoint.dense, checkpoint.spec, config.target, exact=config.exact)
    out = output_path(config.out, config.workspace, str(path.resolve()), config.target)
    refuse_existing(out, overwrite=config.overwrite)
    reader = CheckpointReader(path)
    form = form_for(checkpoint, config, reader)
    shards = plan_shards(form.layout, reader, config.max_shard_bytes)
    require_disk_space(out.parent, shards.total_bytes)
    source = Source(path, str(checkpoint.manifest.source["id"]), "local")
    has_tokenizer = any((path / name).is_file() for name in TOKENIZER_FILES)
    compute, memory = _compute_dtype(reader, config.max_shard_bytes)
    notes = remarks(checkpoint, config)
    if not has_tokenizer:
        notes.append("the checkpoint has no tokenizer: native and export are compared on random token ids")
    for note in notes:
        progress.note(note)
    return ExportPlan(
        config=config,
        checkpoint=checkpoint,
        source=source,
        out=out,
        form=form,
        shards=shards,
        compute=compute,
        sequences=_sequences(checkpoint, source if has_tokenizer else None, config.seed),
        has_tokenizer=has_tokenizer,
        memory_bytes=memory,
        notes=tuple(notes),
    )


def _sequences(checkpoint: NativeCheckpoint, source: Source | None, seed: int) -> list[list[int]]:
    """What native and export are asked: real text where there is a tokenizer."""
    config = checkpoint.dense.config
    sizes = {"vocab_size": int(config.vocab_size), "context": int(config.max_position_embeddings)}
    texts = [] if source is None else text_sequences(load_tokenizer(source), **sizes)
    return texts or random_sequences(**sizes, seed=seed)


def _compute_dtype(reader: CheckpointReader, max_shard_bytes: int) -> tuple[torch.dtype, int]:
    """(float32 where the model fits into memory in it, else the storage dtype; peak bytes).

    Raises:
        ResourceError: the model fits in neither: an export that was not compared is not published.
    """
    count = sum(entry.nbytes // entry.dtype.itemsize for entry in reader.entries.values())
    stored = reader.entry("model.embed_tokens.weight").dtype
    available = psutil.virtual_memory().available
    needed = 0
    for dtype in (torch.float32, stored):
        needed = PROCESS_BYTES + max(count * dtype.itemsize, 3 * max_shard_bytes if count > max_shard_bytes else 0)
        if needed <= available:
            return dtype, needed
    raise ResourceError(
        f"about {needed / 1e9:.1f} GB of memory are needed to compare the export with the native checkpoint; "
        f"{available / 1e9:.1f} GB are available",
        "export on a machine with more memory: nothing is published that was not compared",
    )


def export(config: ExportConfig, progress: Progress) -> ExportResult:
    """Write a native checkpoint in the form of a stock engine, and prove that it computes the same.

    1. Check that the target can hold the model.
    2. Run the native checkpoint over a little text.
    3. Write shard by shard, the scale folded into the down-projections.
    4. Load the result in the stock engine, compare the logits; only then publish it.

    Raises:
        FactorctlError: with what is wrong; nothing is published then.
    """
    started = time.monotonic()
    plan = plan_export(config, progress)
    with progress.stage("Running the native checkpoint"):
        reference = _reference(plan)
    scaling = _router_scaling(plan, reference)
    reader = CheckpointReader(plan.checkpoint.path)
    form = form_for(plan.checkpoint, config, reader, () if scaling is None else scaling.shifts)
    with building(
        plan.out,
        num_shards=len(plan.shards.shards),
        fingerprint=_fingerprint(plan, scaling),
        overwrite=config.overwrite,
        progress=progress,
    ) as builder:
        write_shards(form.layout, plan.shards, reader, builder, progress)
        builder.write_file("config.json", dump_json(form.config))
        for path in plan.source.copied_files():
            builder.copy_file(path)
        builder.write_index()
        verified = _verify_in_transformers(plan, builder, reference, progress)
        builder.write_file("README.md", export_card(plan.checkpoint.manifest, _card_facts(plan, verified)).encode())
        rounding = _scale_rounding(plan, reader)
        manifest = builder.publish(_manifest(plan, verified, scaling, rounding))
    agreement = verified.agreement
    return ExportResult(
        path=str(plan.out),
        checkpoint=str(plan.checkpoint.path),
        format=config.target,
        architecture=form.architecture,
        dtype=form.dtype,
        notation=plan.checkpoint.spec.shape.notation,
        engine=verified.engine,
        tokens_compared=0 if agreement is None else agreement.tokens,
        max_logit_error=None if agreement is None else agreement.max_logit_error,
        top1_agreement=None if agreement is None else agreement.top1_agreement,
        kl=None if agreement is None else agreement.kl,
        scale_rounding=rounding,
        selection_agreement=None if scaling is None else scaling.selection_agreement,
        gate_error=None if scaling is None else scaling.gate_error,
        identical_to_source=_identical_to_source(plan),
        files=len(manifest.files),
        bytes=sum(record.size for record in manifest.files.values()),
        memory_bytes=verified.memory_bytes,
        commit=None,
        seconds=round(time.monotonic() - started, 3),
        peak_rss_bytes=peak_rss_bytes(),
        notes=list(plan.notes),
    )


def _reference(plan: ExportPlan) -> NativeReference:
    return native_reference(
        plan.checkpoint.path,
        plan.sequences,
        top_k=plan.form.top_k,
        dtype=plan.compute,
        device=torch_device(plan.config.device),
    )


def _router_scaling(plan: ExportPlan, reference: NativeReference) -> RouterScaling | None:
    """Shifts for gate `hard` at K > 1, chosen on the router logits of the reference run."""
    if plan.config.target not in ("hf", "gguf") or not needs_router_scaling(plan.checkpoint.spec):
        return None
    narrow = plan.form.dtype == "float16"
    top_k = plan.checkpoint.spec.shape.top_k
    return choose_shifts(reference.router_logits, top_k, max_shift=FP16_MAX_SHIFT if narrow else MAX_SHIFT)


def _verify_in_transformers(
    plan: ExportPlan, builder: ArtefactBuilder, reference: NativeReference, progress: Progress
) -> Verified:
    job = StockJob(builder.partial, dtype_name(plan.compute), plan.sequences)
    with progress.stage("Loading it in stock transformers"):
        (answer,) = ask_stock([job])
    agreement = compare(reference.logits, answer.logits, plan.form.fidelity)
    return Verified(f"transformers {library_versions()['transformers']} ({job.dtype})", agreement, answer.memory_bytes)


def _scale_rounding(plan: ExportPlan, reader: CheckpointReader) -> float | None:
    """Largest rounding error over the layers; None where no scale is folded."""
    if plan.config.target not in ("hf", "gguf"):
        return None
    spec, dtype, layers = plan.checkpoint.spec, cast_to(plan.config), range(plan.checkpoint.dense.num_layers)
    downs = ({"down": reader.read(f"model.layers.{layer}.mlp.down")} for layer in layers)
    return max(scale_rounding(spec, layer, tensors, dtype) for layer, tensors in enumerate(downs))


def _identical_to_source(plan: ExportPlan) -> bool | None:
    if plan.config.target != "dense" or plan.checkpoint.spec.shape.top_k == 0:
        return None
    return is_untouched(plan.checkpoint) and plan.config.dtype == "auto"


def _card_facts(plan: ExportPlan, verified: Verified) -> CardFacts:
    return CardFacts(
        target=plan.config.target,
        architecture=plan.form.architecture,
        dtype=plan.form.dtype,
        engine=verified.engine,
        agreement=verified.agreement,
        notes=plan.notes,
        licence=licence_of(plan.checkpoint.dense.raw, [path.name for path in plan.source.copied_files()]),
    )


def _fingerprint(plan: ExportPlan, scaling: RouterScaling | None) -> str:
    """Names the work: whatever could change a byte of the shards."""
    return hash_value(
        {
            "config": resolved_config(plan.config),
            "parent": plan.checkpoint.manifest.sha256,
            "shifts": [] if scaling is None else list(scaling.shifts),
            "libraries": library_versions(),
            "tool_version": __version__,
        }
    )


def resolved_config(config: ExportConfig) -> dict[str, Any]:
    """The configuration as JSON, without where things are."""
    skipped = {"checkpoint", "out", "workspace", "overwrite", "push", "private"}
    return {key: value for key, value in asdict(config).items() if key not in skipped}


def _manifest(plan: ExportPlan, verified: Verified, scaling: RouterScaling | None, rounding: float | None) -> Manifest:
    parent = plan.checkpoint.manifest
    return Manifest(
        kind="export",
        stage="export",
        tool_version=__version__,
        source=parent.source,
        factored=parent.factored,
        parent=parent.sha256,
        config=resolved_config(plan.config),
        details={
            "architecture": plan.form.architecture,
            "format": plan.config.target,
            "dtype": plan.form.dtype,
            "engine": verified.engine,
            "agreement": None if verified.agreement is None else asdict(verified.agreement),
            "router_scaling": None if scaling is None else asdict(scaling),
            "scale_rounding": rounding,
            "notes": list(plan.notes),
        },
        libraries=library_versions(),
    )
