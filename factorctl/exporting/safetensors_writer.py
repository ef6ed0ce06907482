"""A Hugging Face directory: shards, config.json and the tokenizer, verified by stock transformers."""

from __future__ import annotations

import transformers

from factorctl.checkpoint.builder import ArtefactBuilder
from factorctl.checkpoint.strict_json import dump_json
from factorctl.exporting.comparison import compare
from factorctl.exporting.forms import dtype_name
from factorctl.exporting.jobs import ExportJob, Verified
from factorctl.exporting.native_reference import NativeReference
from factorctl.exporting.shards import plan_shards, write_shards
from factorctl.exporting.stock_reload import StockJob, ask_stock
from factorctl.progress import Progress


class SafetensorsWriter:
    """Writer of `--to hf`, `--to dense` and the quantised forms."""

    def __init__(self, job: ExportJob) -> None:
        self.job = job
        self.plan = plan_shards(job.form.layout, job.reader, job.config.max_shard_bytes)
        self.num_shards, self.weight_bytes = len(self.plan.shards), self.plan.total_bytes
        self.notes: list[str] = []

    def write(self, builder: ArtefactBuilder, progress: Progress) -> None:
        write_shards(self.job.form.layout, self.plan, self.job.reader, builder, progress)
        builder.write_file("config.json", dump_json(self.job.form.config))
        for path in self.job.copied:
            builder.copy_file(path)
        builder.write_index()

    def verify(self, builder: ArtefactBuilder, reference: NativeReference, progress: Progress) -> Verified:
        asked = StockJob(builder.partial, dtype_name(self.job.compute), self.job.sequences)
        with progress.stage("Loading it in stock transformers"):
            (answer,) = ask_stock([asked])
        agreement = compare(reference.logits, answer.logits, self.job.fidelity)
        return Verified(f"transformers {transformers.__version__} in {asked.dtype}", agreement, answer.memory_bytes)
