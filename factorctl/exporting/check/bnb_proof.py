"""Proving a directory that bitsandbytes quantised: weight by weight, and run as users will run it.

Without routing its answers are judged too. Where experts are routed they are stated: rounding sends tokens to other
experts, and nothing in that engine can be asked with every expert on and without the rounding of its activations.
"""

from __future__ import annotations

from pathlib import Path

import transformers

from factorctl.checkpoint.reader import CheckpointReader
from factorctl.exporting.check.comparison import Fidelity, compare, largest_error, require_near
from factorctl.exporting.check.native import native_run, plain
from factorctl.exporting.check.quantised import check_steps
from factorctl.exporting.check.stock import StockJob, ask_quantised, ask_stock
from factorctl.exporting.forms import dtype_name, stored_dtype
from factorctl.exporting.jobs import ExportJob, Verified
from factorctl.exporting.stock.bnb import BnbLayout
from factorctl.progress import Progress

LIMITS = {Fidelity.INT8: 0.4, Fidelity.INT4: 0.8}
"""Largest rms error of a sequence's logits relative to their spread; unrelated logits give 1.4."""
FINITE = 1e30
UNSTABLE = (
    "every weight is within a quantisation step, yet the answers part from the native model's: its routing is "
    "unstable, as before finetuning"
)


def prove_quantised(job: ExportJob, directory: Path, progress: Progress) -> Verified:
    """Read every weight back, then load `directory` in its stored dtype, which is what its memory is stated for.

    Raises:
        IntegrityError: a weight strays.
        StockReloadError: it does not load as a whole.
        ExportMismatchError: its answers are those of another model.
    """
    layout, dtype, question = job.form.layout, dtype_name(stored_dtype(job.config, job.reader)), plain(job.sequences)
    assert isinstance(layout, BnbLayout)
    routed = job.form.quantised_experts is not None
    with progress.stage("Reading every weight back"):
        check_steps(layout, job.reader.read, CheckpointReader(directory))
    with progress.stage("Loading it with factorctl.load" if routed else "Loading it in stock transformers"):
        (answer,) = (ask_quantised if routed else ask_stock)([StockJob(directory, dtype, question)])
    with progress.stage("Running the native checkpoint"):
        native = native_run(job.checkpoint.dense, job.native_spec, job.reader.read, question, device=job.device)
    usual = LIMITS[Fidelity.INT4 if layout.bits == 4 else Fidelity.INT8]
    require_near(largest_error(native.logits, answer.logits), FINITE if routed else usual, "as it is served")
    agreement = compare(native.logits, answer.logits)
    through = " through factorctl.load" if routed else ""
    engine = f"transformers {transformers.__version__}{through}, in {dtype}"
    notes = (UNSTABLE,) if routed and agreement.relative_error > usual else ()
    return Verified(engine, agreement, answer.memory_bytes, notes=notes)
