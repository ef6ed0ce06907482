"""What `export` decides before it loads a weight: form, container, the text to compare on, dtype, memory and disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from factorctl.checkpoint.publishing import refuse_existing, require_disk_space
from factorctl.checkpoint.reader import CheckpointReader
from factorctl.checkpoint.sources import copied_files
from factorctl.config import ExportConfig
from factorctl.errors import UsageError
from factorctl.exporting.architectures import refuse_blocked
from factorctl.exporting.forms import form_for, remarks
from factorctl.exporting.gguf_writer import GgufWriter
from factorctl.exporting.jobs import ExportJob, Writer
from factorctl.exporting.safetensors_writer import SafetensorsWriter
from factorctl.exporting.verification_text import random_sequences, text_sequences
from factorctl.memory import PROCESS_BYTES, available_memory, require_memory
from factorctl.models.loading import open_checkpoint
from factorctl.pipeline.tokenizers import has_tokenizer, load_tokenizer
from factorctl.pipeline.workspace import newest_checkpoint, output_path
from factorctl.progress import Progress


@dataclass(frozen=True)
class ExportPlan:
    """Everything that is decided before the first weight is read."""

    out: Path
    job: ExportJob
    writer: Writer
    memory_bytes: int
    notes: tuple[str, ...]

    @property
    def disk_bytes(self) -> int:
        return self.writer.weight_bytes


def plan_export(config: ExportConfig, progress: Progress) -> ExportPlan:
    """Resolve and check all that can be checked without reading weights.

    Raises:
        UsageError: no checkpoint, or the target cannot hold it.
        ResourceError: disk or memory do not suffice.
    """
    _refuse_idle_options(config)
    path = config.checkpoint or newest_checkpoint(config.workspace)
    if config.checkpoint is None:
        progress.note(f"no checkpoint was named; taking the newest, {path}")
    out = output_path(config.out, config.workspace, str(path.resolve()), config.target)
    refuse_existing(out, overwrite=config.overwrite)
    with progress.stage("Hashing the checkpoint"):
        checkpoint = open_checkpoint(path)
    refuse_blocked(checkpoint.dense, checkpoint.spec, config.target, exact=config.exact)
    reader = CheckpointReader(path)
    compute, memory = _compute_dtype(reader, config.max_shard_bytes)
    tokenise = _tokeniser(path)
    sizes = {
        "vocab_size": int(checkpoint.dense.config.vocab_size),
        "context": int(checkpoint.dense.config.max_position_embeddings),
    }
    texts = [] if tokenise is None else text_sequences(tokenise, **sizes)
    job = ExportJob(
        config=config,
        checkpoint=checkpoint,
        reader=reader,
        form=form_for(checkpoint, config, reader),
        copied=tuple(copied_files(path)),
        sequences=texts or random_sequences(**sizes, seed=config.seed),
        tokenise=tokenise,
        compute=compute,
    )
    writer = writer_for(job)
    require_disk_space(out.parent, writer.weight_bytes)
    notes = [*remarks(checkpoint, config), *writer.notes]
    if not texts:
        notes.append("without a tokenizer, native and export are compared on random token ids")
    for note in notes:
        progress.note(note)
    return ExportPlan(out, job, writer, memory, tuple(notes))


def _refuse_idle_options(config: ExportConfig) -> None:
    """Options that the target would ignore."""
    if config.target != "gguf" and (config.quant != "auto" or config.verify_gguf):
        option = "--verify-gguf" if config.quant == "auto" else f"--quant {config.quant}"
        raise UsageError(f"{option} has no meaning with --to {config.target}", "it belongs to --to gguf")


def writer_for(job: ExportJob) -> Writer:
    """The writer of the form's container."""
    return GgufWriter(job) if job.form.container == "gguf" else SafetensorsWriter(job)


def _tokeniser(directory: Path) -> Callable[[str], list[int]] | None:
    """From text to ids, special tokens included; None where the checkpoint has no tokenizer."""
    if not has_tokenizer(directory):
        return None
    tokenizer = load_tokenizer(directory, hint="put the model's own tokenizer files there")
    return lambda text: [int(token) for token in tokenizer(text)["input_ids"]]


def _compute_dtype(reader: CheckpointReader, max_shard_bytes: int) -> tuple[torch.dtype, int]:
    """(float32 where the model fits into memory in it, else the storage dtype; peak bytes).

    Raises:
        ResourceError: the model fits in neither: an export that was not compared is not published.
    """
    count = sum(entry.nbytes // entry.dtype.itemsize for entry in reader.entries.values())
    stored, available = reader.entry("model.embed_tokens.weight").dtype, available_memory()

    def needed(dtype: torch.dtype) -> int:
        return PROCESS_BYTES + max(count * dtype.itemsize, 3 * max_shard_bytes if count > max_shard_bytes else 0)

    if needed(torch.float32) <= available:
        return torch.float32, needed(torch.float32)
    hint = "export on a machine with more memory: nothing is published that was not compared"
    require_memory(needed(stored), available, hint=hint, purpose=" to compare the export with the native checkpoint")
    return stored, needed(stored)
