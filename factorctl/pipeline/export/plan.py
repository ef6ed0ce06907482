"""What `export` decides before it loads a weight: form, container, the text to compare on, dtype, memory and disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from factorctl.checkpoint.reader import CheckpointReader
from factorctl.checkpoint.sources import copied_files
from factorctl.config.export import ExportConfig
from factorctl.errors import UsageError
from factorctl.exporting.check.text import RANDOM_SEQUENCES, SEQUENCE_TOKENS, random_sequences, text_sequences
from factorctl.exporting.engine_remarks import engine_remarks, padding_remarks
from factorctl.exporting.forms import EMBEDDING, form_for, remarks
from factorctl.exporting.gguf.writer import GgufWriter
from factorctl.exporting.jobs import ExportJob, Writer
from factorctl.exporting.stock.choice import refuse_blocked
from factorctl.exporting.stock.writer import SafetensorsWriter
from factorctl.files.publishing import refuse_existing, require_disk_space
from factorctl.memory import PROCESS_BYTES, available_memory, require_memory
from factorctl.models.families import layer_prefix
from factorctl.models.loading import open_checkpoint
from factorctl.pipeline.common.devices import torch_device
from factorctl.pipeline.common.tokenizers import has_tokenizer, load_tokenizer
from factorctl.pipeline.common.workspace import newest_checkpoint, output_path
from factorctl.progress import Progress

_FLOAT64 = 8
_LOGITS = 28
"""Bytes per logit: one run in float64, five kept in float32."""


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
    if checkpoint.spec.domains is not None:
        raise UsageError(
            f"{path} chooses experts by the domain of a text, which no stock engine does",
            "export a checkpoint that routes token by token; `factorctl.load` runs this one",
        )
    refuse_blocked(checkpoint.dense, checkpoint.spec, config.target, exact=config.exact, arch=config.arch)
    reader = CheckpointReader(path)
    fits, memory = _memory_to_prove(reader, config)
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
        fits_in_memory=fits,
        device=torch_device(config.device),
    )
    writer = writer_for(job)
    require_disk_space(out.parent, writer.weight_bytes)
    notes = [*remarks(checkpoint, config), *padding_remarks(checkpoint, job.form), *writer.notes]
    notes += engine_remarks(checkpoint, config)
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
    if config.target in ("gguf", "dense") and config.arch != "auto":
        reason = "llama.cpp's architectures are its own" if config.target == "gguf" else "that is the source's"
        raise UsageError(f"--arch {config.arch} has no meaning with --to {config.target}: {reason}", "leave it out")
    if config.target == "dense" and config.pad_experts != "auto":
        raise UsageError(f"--pad-experts {config.pad_experts} has no meaning with --to dense", "it has no experts")


def writer_for(job: ExportJob) -> Writer:
    """The writer of the form's container."""
    return GgufWriter(job) if job.form.container == "gguf" else SafetensorsWriter(job)


def _tokeniser(directory: Path) -> Callable[[str], list[int]] | None:
    """From text to ids, special tokens included; None where the checkpoint has no tokenizer."""
    if not has_tokenizer(directory):
        return None
    tokenizer = load_tokenizer(directory, hint="put the model's own tokenizer files there")
    return lambda text: [int(token) for token in tokenizer(text)["input_ids"]]


def _memory_to_prove(reader: CheckpointReader, config: ExportConfig) -> tuple[bool, int]:
    """(whether the whole model fits into memory in float64, peak bytes of the way that is taken).

    The native model always runs with one layer in memory, so the engine decides. llama.cpp and bitsandbytes hold the
    file as it is.

    Raises:
        ResourceError: not even one layer and the vocabulary fit: an export that was not compared is not published.
    """
    sizes = {name: entry.nbytes // entry.dtype.itemsize for name, entry in reader.entries.items()}
    total, available = sum(sizes.values()), available_memory()
    rest = sum(size for name, size in sizes.items() if not name.startswith("model.layers."))
    layer = sum(size for name, size in sizes.items() if name.startswith(layer_prefix(0)))
    logits = SEQUENCE_TOKENS * RANDOM_SEQUENCES * reader.entry(EMBEDDING).shape[0] * _LOGITS
    writing = 3 * config.max_shard_bytes if total > config.max_shard_bytes else 0
    by_layer = 2 * PROCESS_BYTES + logits + max(_FLOAT64 * (rest + layer), writing)
    whole = 2 * PROCESS_BYTES + logits + max(_FLOAT64 * total, writing)
    if config.target in ("hf", "dense") and whole <= available:
        return True, whole
    hint = "export on a machine with more memory: nothing is published that was not compared"
    require_memory(by_layer, available, hint=hint, purpose=" to compare the export with the native checkpoint")
    return False, by_layer
