"""Proving a Hugging Face directory: stock transformers and the native model, both in float64, over the same text.

Half of the sequences are spread over the model's context, so that RoPE is compared far out too.
"""

from __future__ import annotations

from pathlib import Path

import transformers

from factorctl.exporting.check.comparison import (
    FLOAT64_LIMIT,
    ExportMismatchError,
    Fidelity,
    Proof,
    compare,
    largest_error,
    require_near,
    require_same_routers,
)
from factorctl.exporting.check.native import NativeRun, Question, native_run
from factorctl.exporting.check.near_ties import FLOAT64, near_ties
from factorctl.exporting.check.rounding import rounding_of
from factorctl.exporting.check.stock import StockAnswer, StockJob, ask_stock
from factorctl.exporting.check.stored_values import exported_spec, stored_values
from factorctl.exporting.check.text import spread_positions
from factorctl.exporting.jobs import ExportJob, Verified
from factorctl.progress import Progress


def prove_in_transformers(job: ExportJob, directory: Path, progress: Progress) -> Verified:
    """Load `directory` in stock transformers and hold it against the native model of the values it stores.

    Raises:
        StockReloadError: it does not load as a whole.
        ExportMismatchError: it computes something else.
    """
    question = Question(job.sequences, spread_positions(job.sequences, job.context))
    spec, read = exported_spec(job), stored_values(job)
    lengths = [len(ids) for ids in question.sequences]
    by_sigmoids = job.form.scores == "sigmoid"
    routes = spec.shape.routes
    served = StockJob(directory, "float64", question, by_layer=not job.fits_in_memory)
    every_expert = StockJob(directory, "float64", question, spec.shape.num_experts, by_layer=not job.fits_in_memory)
    with progress.stage("Loading it in stock transformers"):
        answers = ask_stock([served, every_expert] if routes else [served])
    with progress.stage("Comparing"):
        dense, device = job.checkpoint.dense, job.device
        ours = native_run(dense, spec, read, question, by_sigmoids=by_sigmoids, device=device)
        if routes:
            smooth = native_run(dense, spec, read, question, every_expert=True, by_sigmoids=by_sigmoids, device=device)
            all_experts_error = _require_same(smooth, answers[1], "with every expert on")
        else:
            all_experts_error = None
        ties = near_ties(ours.routing, lengths, FLOAT64)
        served_error = largest_error(ours.logits, answers[0].logits, ties.sound)
        require_near(served_error, FLOAT64_LIMIT, "as it is served, before any near tie of routing")
        proof = Proof(all_experts_error, served_error, sum(ties.sound), sum(lengths), ties.share)
        original, rounding = ours, None
        if job.form.fidelity is not Fidelity.EXACT:
            original = native_run(dense, job.native_spec, job.reader.read, question, device=device)
            rounding = rounding_of(
                dense, spec, read, question, native=original, rounded=ours, by_sigmoids=by_sigmoids, device=device
            )
    agreement = compare(original.logits, answers[0].logits)
    how = "float64" if job.fits_in_memory else "float64, a layer at a time"
    return Verified(f"transformers {transformers.__version__} in {how}", agreement, proof=proof, rounding=rounding)


def _require_same(ours: NativeRun, theirs: StockAnswer, run: str) -> float | None:
    """The largest error of the logits, after routers and logits were judged."""
    routers = [layer.logits_TN for layer in ours.routing]
    if len(theirs.router_logits) != len(routers):
        raise ExportMismatchError(
            f"{len(theirs.router_logits)} layers route in {theirs.class_name}, not {len(routers)}"
        )
    require_same_routers(routers, theirs.router_logits, FLOAT64_LIMIT)
    error = largest_error(ours.logits, theirs.logits)
    require_near(error, FLOAT64_LIMIT, run)
    return error
