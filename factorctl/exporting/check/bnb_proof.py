"""Proving a directory that bitsandbytes quantised: weight by weight, and run as users will run it.

Every weight is read back: within half a step of what it stands for, all others equal. Without routing the answers are
judged too. Where experts are routed they are stated: rounding sends tokens to other experts, however well every weight
is kept, and nothing in that engine can be asked with every expert on and without the rounding of its activations.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from factorctl.checkpoint.reader import CheckpointReader
from factorctl.errors import IntegrityError
from factorctl.exporting.check.comparison import Fidelity, compare, largest_error, require_near
from factorctl.exporting.check.native import native_run, plain
from factorctl.exporting.check.stock import StockJob, ask_quantised, ask_stock
from factorctl.exporting.forms import dtype_name, stored_dtype
from factorctl.exporting.jobs import ExportJob, Verified
from factorctl.exporting.stock.bnb import BnbLayout
from factorctl.models.families import ReadTensor
from factorctl.models.quantised.loading import dequantised
from factorctl.models.quantised.storage import BLOCK_SIZE, is_quantised
from factorctl.progress import Progress

LIMITS = {Fidelity.INT8: 0.4, Fidelity.INT4: 0.8}
"""Largest rms error of a sequence's logits relative to their spread; unrelated logits give 1.4."""
FINITE = 1e30
WIDEST_NF4_GAP = 1 - 0.6961928
"""Between the two lowest of nf4's 16 values, of which the largest magnitude is 1."""
SLACK = {4: 1.01, 8: 1.2}
"""Arithmetic in float32; in 8 bits weights are rounded to float16 first."""
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


def check_steps(layout: BnbLayout, read: ReadTensor, export: CheckpointReader) -> None:
    """Compare an export with the form in full precision that it was made of, unit by unit.

    Raises:
        IntegrityError: naming the first tensor that strays.
    """
    for unit in range(layout.num_units):
        for name, weight in layout.full.unit(unit, read).items():
            if is_quantised(name):
                held = dequantised(name, weight.shape, layout.bits, export)
                strays = (held - weight.float()).abs() > SLACK[layout.bits] * _half_step(weight.float(), layout.bits)
            else:
                strays = export.read(name) != weight
            if bool(strays.any()):
                raise IntegrityError(
                    f"tensor {name} of the export is not what it stands for: {int(strays.sum())} of {strays.numel()} "
                    "weights are off by more than a rounding step",
                    "nothing was published",
                )


def _half_step(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """How far rounding may move each weight: half a step of its row in 8 bits, half the widest of its block in 4."""
    if bits == 8:
        return weight.abs().amax(-1, keepdim=True) / 127 / 2
    flat = weight.flatten().abs()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK_SIZE)).view(-1, BLOCK_SIZE)
    largest = blocks.amax(-1, keepdim=True).expand_as(blocks).flatten()[: len(flat)]
    return (largest * WIDEST_NF4_GAP / 2).view(weight.shape)
