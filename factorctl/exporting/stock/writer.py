"""A Hugging Face directory: shards, config.json and the tokenizer, verified by stock transformers."""

from __future__ import annotations

import torch

from factorctl.checkpoint.builder import ArtefactBuilder
from factorctl.exporting.check.bnb_proof import prove_quantised
from factorctl.exporting.check.stock_proof import prove_in_transformers
from factorctl.exporting.forms import gives_source_back, groups_experts, stored_dtype
from factorctl.exporting.jobs import ExportJob, Verified
from factorctl.exporting.stock.bnb import BnbLayout
from factorctl.exporting.stock.shards import plan_shards, write_shards
from factorctl.exporting.stock.tokenizer_files import portable_bytes
from factorctl.files.names import name_in_artefact
from factorctl.files.strict_json import dump_json
from factorctl.progress import Progress


class SafetensorsWriter:
    """Writer of `--to hf`, `--to dense` and the quantised forms."""

    def __init__(self, job: ExportJob) -> None:
        self.job = job
        self.plan = plan_shards(job.form.layout, job.reader, job.config.max_shard_bytes)
        self.num_shards, self.weight_bytes = len(self.plan.shards), self.plan.total_bytes
        self.notes: list[str] = []
        self.loads_eagerly = not self._groups_experts(stored_dtype(job.config, job.reader))
        if self.loads_eagerly:
            self.notes.append(
                f"transformers' default for experts (grouped_mm) refuses rows of this size in {job.form.dtype}: load "
                'it with experts_implementation="eager"; vLLM and llama.cpp have kernels of their own'
            )

    def write(self, builder: ArtefactBuilder, progress: Progress) -> None:
        write_shards(self.job.form.layout, self.plan, self.job.reader, builder, progress)
        builder.write_file("config.json", dump_json(self.job.form.config))
        for path in self.job.copied:
            as_it_is = gives_source_back(self.job.checkpoint, self.job.config)
            builder.write_file(name_in_artefact(path), path.read_bytes() if as_it_is else portable_bytes(path))
        builder.write_index()

    def verify(self, builder: ArtefactBuilder, progress: Progress) -> Verified:
        prove = prove_quantised if isinstance(self.job.form.layout, BnbLayout) else prove_in_transformers
        return prove(self.job, builder.partial, progress)

    def _groups_experts(self, dtype: torch.dtype) -> bool:
        """Whether transformers' default takes the experts in this dtype; dense forms have none."""
        return self.job.config.target != "hf" or groups_experts(self.job.checkpoint, self.job.form, dtype)
