"""`export`: a native checkpoint in, a directory that stock engines load out, compared before it is published."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace

import torch

from factorctl import __version__
from factorctl.checkpoint.builder import building
from factorctl.checkpoint.manifest import Manifest
from factorctl.config.export import ExportConfig
from factorctl.config.option import recorded
from factorctl.exporting.card import CardFacts, export_card, next_steps
from factorctl.exporting.check.hard_gate import (
    FP16_MAX_SHIFT,
    MAX_SHIFT,
    RouterScaling,
    choose_shifts,
    choose_unsaturated_shifts,
)
from factorctl.exporting.check.native import native_run, plain
from factorctl.exporting.check.rounding import require_accepted
from factorctl.exporting.forms import cast_to, form_for, gives_source_back, stored_dtype
from factorctl.exporting.gguf.file import GGUF_NAME
from factorctl.exporting.jobs import ExportJob, Verified, Writer
from factorctl.exporting.origin import base_name, licence_of
from factorctl.exporting.push import prepare_push, push
from factorctl.exporting.reports import evaluation_results, report_tables
from factorctl.exporting.stock.choice import architecture_for, becomes_mixture, needs_router_scaling
from factorctl.exporting.stock.folding import scale_rounding
from factorctl.exporting.stock.writer import SafetensorsWriter
from factorctl.files.hashing import hash_value
from factorctl.memory import peak_memory
from factorctl.models.families import ffn_prefix
from factorctl.pipeline.common.provenance import library_versions
from factorctl.pipeline.export.plan import ExportPlan, plan_export, writer_for
from factorctl.progress import Progress


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
    all_experts_error: float | None
    """Largest rms error of a sequence's logits relative to their spread, with every expert on in engine and native
    model of the stored values; None where nothing is routed or no engine was at hand."""
    tokens_judged: int | None
    """As it is served: tokens before the first routing decision of their sequence nearer to a tie than rounding."""
    near_ties: float | None
    """Share of routing decisions that are."""
    changed_choices: float | None
    """Share of routing decisions that choose other experts because values were rounded; None where none was."""
    kl_same_experts: float | None
    """KL that rounding would leave if every token kept its experts."""
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
    bits_per_weight: float | None
    """With `--to gguf`: over all tensors of the file."""
    commit: str | None
    """Hub commit, with `--push`."""
    seconds: float
    peak_rss_bytes: int
    notes: list[str] = field(default_factory=list)
    next_steps: list[str] = field(default_factory=list)
    """What to type next with what was written."""


def export(config: ExportConfig, progress: Progress) -> ExportResult:
    """Write a native checkpoint in the form of a stock engine, and prove that it computes the same.

    1. Check that the target can hold the model.
    2. For a hard gate, look how far its routers can be scaled down on a little text.
    3. Write layer by layer, the scale folded into the down-projections.
    4. Load the result in the stock engine and hold it against the native model; only then publish it.
    5. Upload it, if that was asked for.

    Raises:
        FactorctlError: with what is wrong; nothing is published then.
    """
    started = time.monotonic()
    plan = plan_export(config, progress)
    repo = None if config.push is None else prepare_push(config.push, private=config.private)
    scaling = _router_scaling(plan.job, progress)
    job = plan.job if scaling is None else _with_shifts(plan.job, scaling)
    writer = plan.writer if scaling is None else writer_for(job)
    with building(
        plan.out,
        num_shards=writer.num_shards,
        fingerprint=_fingerprint(job, scaling),
        overwrite=config.overwrite,
        progress=progress,
    ) as builder:
        writer.write(builder, progress)
        verified = writer.verify(builder, progress)
        found = (*verified.notes, *_accepted(job, verified))
        for note in found:
            progress.note(note)
        notes, rounding = [*plan.notes, *found], _scale_rounding(job)
        facts = _card_facts(job, verified, notes, loads_eagerly=_loads_eagerly(writer))
        builder.write_file("README.md", export_card(job.checkpoint.manifest, facts).encode())
        manifest = builder.publish(_manifest(job, verified, scaling, rounding, notes))
    commit = None if repo is None else _push(plan, repo, progress)
    agreement, proof, moved = verified.agreement, verified.proof, verified.rounding
    return ExportResult(
        path=str(plan.out),
        checkpoint=str(job.checkpoint.path),
        format=config.target,
        architecture=job.form.architecture,
        dtype=job.form.dtype,
        notation=job.checkpoint.spec.shape.notation,
        engine=verified.engine,
        tokens_compared=0 if agreement is None else agreement.tokens,
        max_logit_error=None if agreement is None else agreement.max_logit_error,
        top1_agreement=None if agreement is None else agreement.top1_agreement,
        kl=None if agreement is None else agreement.kl,
        all_experts_error=None if proof is None else proof.all_experts_error,
        tokens_judged=None if proof is None else proof.judged_tokens,
        near_ties=None if proof is None else proof.near_ties,
        changed_choices=None if moved is None else moved.changed_choices,
        kl_same_experts=None if moved is None else moved.kl_same_experts,
        scale_rounding=rounding,
        selection_agreement=None if scaling is None else scaling.selection_agreement,
        gate_error=None if scaling is None else scaling.gate_error,
        identical_to_source=_identical_to_source(job),
        files=len(manifest.files),
        bytes=manifest.total_bytes,
        memory_bytes=verified.memory_bytes,
        bits_per_weight=verified.bits_per_weight,
        commit=commit,
        seconds=round(time.monotonic() - started, 3),
        peak_rss_bytes=peak_memory(),
        notes=notes,
        next_steps=next_steps(plan.out, job.form, has_tokenizer=job.tokenise is not None),
    )


def _router_scaling(job: ExportJob, progress: Progress) -> RouterScaling | None:
    """Shifts for gate `hard` at K > 1 and for one expert of several under sigmoids, by the native router's logits."""
    dense, spec, config = job.checkpoint.dense, job.checkpoint.spec, job.config
    if not becomes_mixture(config.target, spec) or spec.shape.top_k == spec.shape.num_experts:
        return None
    by_sigmoid = config.target != "gguf" and architecture_for(dense, spec, config.arch).scores == "sigmoid"
    if not (needs_router_scaling(spec) or by_sigmoid):
        return None
    is_narrow = stored_dtype(config, job.reader) is torch.float16
    max_shift = FP16_MAX_SHIFT if is_narrow else MAX_SHIFT
    with progress.stage("Running the native checkpoint"):
        run = native_run(dense, spec, job.reader.read, plain(job.sequences), device=job.device)
    logits = [layer.logits_TN.float() for layer in run.routing]
    if needs_router_scaling(spec):
        return choose_shifts(logits, spec.shape.top_k, max_shift=max_shift)
    return choose_unsaturated_shifts(logits, max_shift=max_shift)


def _accepted(job: ExportJob, verified: Verified) -> list[str]:
    """Notes on what rounding did, unless it moved the model further than is usual or than was accepted."""
    if verified.agreement is None:
        return []
    accepted, fidelity, dtype = job.config.accept_difference, job.form.fidelity, job.form.dtype
    return require_accepted(verified.agreement, verified.rounding, fidelity, dtype=dtype, accepted=accepted)


def _with_shifts(job: ExportJob, scaling: RouterScaling) -> ExportJob:
    """The job with the router of every layer divided by its power of two."""
    form = form_for(job.checkpoint, job.config, job.reader, scaling.shifts)
    return replace(job, form=form, shifts=scaling.shifts)


def _scale_rounding(job: ExportJob) -> float | None:
    """Largest rounding error over the layers; None where no scale is folded."""
    if job.config.target not in ("hf", "gguf"):
        return None
    dtype, layers = cast_to(job.config), range(job.checkpoint.dense.num_layers)
    downs = ({"down": job.reader.read(f"{ffn_prefix(layer)}.down")} for layer in layers)
    return max(scale_rounding(job.checkpoint.spec, layer, tensors, dtype) for layer, tensors in enumerate(downs))


def _push(plan: ExportPlan, repo: str, progress: Progress) -> str:
    shape, target = plan.job.checkpoint.spec.shape, plan.job.config.target
    with progress.stage(f"Uploading to {repo}"):
        return push(plan.out, repo, message=f"{shape.notation} as {target}, by factorctl {__version__}")


def _identical_to_source(job: ExportJob) -> bool | None:
    if job.config.target != "dense" or job.checkpoint.spec.shape.top_k == 0:
        return None
    return gives_source_back(job.checkpoint, job.config)


def _loads_eagerly(writer: Writer) -> bool:
    return isinstance(writer, SafetensorsWriter) and writer.loads_eagerly


def _card_facts(job: ExportJob, verified: Verified, notes: list[str], *, loads_eagerly: bool) -> CardFacts:
    report_directories = [job.config.workspace, job.config.workspace / "reports", job.checkpoint.path.parent]
    return CardFacts(
        config=recorded(job.config),
        architecture=job.form.architecture,
        dtype=job.form.dtype,
        engine=verified.engine,
        agreement=verified.agreement,
        proof=verified.proof,
        rounding=verified.rounding,
        name=base_name(job.checkpoint.manifest.source, job.checkpoint.dense.raw)[0],
        notes=notes,
        memory_bytes=verified.memory_bytes if job.form.quantised_experts else None,
        gguf_file=GGUF_NAME if job.form.container == "gguf" else None,
        bits_per_weight=verified.bits_per_weight,
        needs_factorctl=job.form.quantised_experts is not None,
        reports=report_tables(report_directories, job.checkpoint.manifest.sha256),
        loads_eagerly=loads_eagerly,
        results=evaluation_results(report_directories, job.checkpoint.manifest.sha256),
        licence=licence_of(job.checkpoint.manifest.source, job.checkpoint.dense.raw, job.licences),
        licence_files=[path.name for path in job.licences],
    )


def _fingerprint(job: ExportJob, scaling: RouterScaling | None) -> str:
    """Names the work: whatever could change a byte of the shards."""
    return hash_value(
        {
            "config": recorded(job.config),
            "parent": job.checkpoint.manifest.sha256,
            "shifts": [] if scaling is None else list(scaling.shifts),
            "libraries": library_versions(),
            "tool_version": __version__,
        }
    )


def _manifest(
    job: ExportJob, verified: Verified, scaling: RouterScaling | None, rounding: float | None, notes: list[str]
) -> Manifest:
    parent, form = job.checkpoint.manifest, job.form
    return Manifest(
        kind="export",
        stage="export",
        tool_version=__version__,
        source=parent.source,
        factored=parent.factored,
        parent=parent.sha256,
        config=recorded(job.config),
        details={
            "architecture": form.architecture,
            "format": job.config.target,
            "dtype": form.dtype,
            "quantised_experts": form.quantised_experts,
            "memory_bytes": verified.memory_bytes,
            "bits_per_weight": verified.bits_per_weight,
            "engine": verified.engine,
            "agreement": None if verified.agreement is None else asdict(verified.agreement),
            "proof": None if verified.proof is None else asdict(verified.proof),
            "rounding": None if verified.rounding is None else asdict(verified.rounding),
            "router_scaling": None if scaling is None else asdict(scaling),
            "scale_rounding": rounding,
            "notes": notes,
        },
        libraries=library_versions(),
    )
