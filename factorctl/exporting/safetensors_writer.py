"""A Hugging Face directory: shards, config.json and the tokenizer, verified by stock transformers."""

from __future__ import annotations

import torch
import transformers

from factorctl.checkpoint.builder import ArtefactBuilder
from factorctl.checkpoint.reader import CheckpointReader
from factorctl.checkpoint.strict_json import dump_json
from factorctl.exporting.bnb_layout import BnbLayout
from factorctl.exporting.comparison import RELATIVE_LIMITS, Fidelity, compare
from factorctl.exporting.forms import dtype_name, groups_experts, stored_dtype
from factorctl.exporting.jobs import ExportJob, Verified
from factorctl.exporting.native_reference import NativeReference
from factorctl.exporting.quantised_check import check_steps
from factorctl.exporting.shards import plan_shards, write_shards
from factorctl.exporting.stock_reload import StockJob, ask_quantised, ask_stock
from factorctl.progress import Progress

UNSTABLE = (
    "every weight is within a quantisation step, yet the answers part from the native model's: its routing is "
    "unstable, as before finetuning"
)


class SafetensorsWriter:
    """Writer of `--to hf`, `--to dense` and the quantised forms."""

    def __init__(self, job: ExportJob) -> None:
        self.job = job
        self.plan = plan_shards(job.form.layout, job.reader, job.config.max_shard_bytes)
        self.num_shards, self.weight_bytes = len(self.plan.shards), self.plan.total_bytes
        self.notes: list[str] = []
        if not self._groups_experts(stored_dtype(job.config, job.reader)):
            size = job.checkpoint.spec.shape.expert_size
            self.notes.append(
                f"transformers' default for experts (grouped_mm) refuses {size} neurons in {job.form.dtype}: load it "
                'with experts_implementation="eager"; vLLM and llama.cpp have kernels of their own'
            )

    def write(self, builder: ArtefactBuilder, progress: Progress) -> None:
        write_shards(self.job.form.layout, self.plan, self.job.reader, builder, progress)
        builder.write_file("config.json", dump_json(self.job.form.config))
        for path in self.job.copied:
            builder.copy_file(path)
        builder.write_index()

    def verify(self, builder: ArtefactBuilder, reference: NativeReference, progress: Progress) -> Verified:
        if self.job.form.quantised_experts is not None:
            return self._verify_quantised(builder, reference, progress)
        experts = None if self._groups_experts(self.job.compute) else "eager"
        asked = StockJob(builder.partial, dtype_name(self.job.compute), self.job.sequences, experts=experts)
        with progress.stage("Loading it in stock transformers"):
            (answer,) = ask_stock([asked])
        agreement = compare(reference.logits, answer.logits, self.job.fidelity)
        return Verified(f"transformers {transformers.__version__} in {asked.dtype}", agreement, answer.memory_bytes)

    def _verify_quantised(self, builder: ArtefactBuilder, reference: NativeReference, progress: Progress) -> Verified:
        """As users will load it, in the stored dtype, which is also what its memory is stated for."""
        layout, dtype = self.job.form.layout, dtype_name(stored_dtype(self.job.config, self.job.reader))
        assert isinstance(layout, BnbLayout)
        with progress.stage("Reading every weight back"):
            check_steps(layout, self.job.reader.read, CheckpointReader(builder.partial))
        with progress.stage("Loading it with factorctl.load"):
            (answer,) = ask_quantised([StockJob(builder.partial, dtype, self.job.sequences)])
        agreement = compare(reference.logits, answer.logits, self.job.fidelity)
        engine = f"transformers {transformers.__version__} through factorctl.load, in {dtype}"
        usual = RELATIVE_LIMITS[Fidelity.INT4 if layout.bits == 4 else Fidelity.INT8]
        notes = (UNSTABLE,) if agreement.relative_error > usual else ()
        return Verified(engine, agreement, answer.memory_bytes, notes)

    def _groups_experts(self, dtype: torch.dtype) -> bool:
        """Whether transformers' default takes the experts in this dtype; dense forms have none."""
        return self.job.config.target != "hf" or groups_experts(self.job.checkpoint, dtype)
