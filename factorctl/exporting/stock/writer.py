"""A Hugging Face directory: shards, config.json and the tokenizer, verified by stock transformers.

tokenizer_config.json is written in words that transformers 4 and 5 both know. transformers 5 names its own base class,
`TokenizersBackend`, where tokenizer.json alone describes a tokenizer; and it lists further special tokens as
`extra_special_tokens`. transformers 4 refuses the name and fails on the list. Both know `PreTrainedTokenizerFast` and
`additional_special_tokens`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from factorctl.checkpoint.builder import ArtefactBuilder
from factorctl.exporting.check.bnb_proof import prove_quantised
from factorctl.exporting.check.stock_proof import prove_in_transformers
from factorctl.exporting.forms import gives_source_back, groups_experts, stored_dtype
from factorctl.exporting.jobs import ExportJob, Verified
from factorctl.exporting.stock.bnb import BnbLayout
from factorctl.exporting.stock.shards import plan_shards, write_shards
from factorctl.files.names import name_in_artefact
from factorctl.files.strict_json import dump_json, read_json_object
from factorctl.progress import Progress

TOKENIZER_CONFIG = "tokenizer_config.json"
PORTABLE_CLASS = "PreTrainedTokenizerFast"
_NEW_CLASSES = frozenset({"TokenizersBackend", "PythonBackend", "SentencePieceBackend"})
_OF_ONE_LOADING = frozenset({"backend", "is_local", "local_files_only"})
"""What transformers 5 wrote down of how it had loaded the tokenizer before it saved it."""


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


def portable_bytes(path: Path) -> bytes:
    """The file as it is, unless it is a tokenizer_config.json that only transformers 5 reads."""
    if path.name != TOKENIZER_CONFIG:
        return path.read_bytes()
    raw = read_json_object(path)
    portable = portable_config(raw, has_tokenizer_json=(path.parent / "tokenizer.json").is_file())
    return path.read_bytes() if portable == raw else dump_json(portable)


def portable_config(raw: dict[str, Any], *, has_tokenizer_json: bool) -> dict[str, Any]:
    """`raw` with what transformers 5 alone knows said in the older words; unchanged where there is nothing of it."""
    config = dict(raw)
    if config.get("tokenizer_class") in _NEW_CLASSES and has_tokenizer_json:
        config["tokenizer_class"] = PORTABLE_CLASS
    extra = config.get("extra_special_tokens")
    if isinstance(extra, list):
        del config["extra_special_tokens"]
        if extra:
            config["additional_special_tokens"] = [*config.get("additional_special_tokens", []), *extra]
    if config != raw or "backend" in raw:
        config = {key: value for key, value in config.items() if key not in _OF_ONE_LOADING}
    return config
