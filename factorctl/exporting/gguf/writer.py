"""A GGUF file with a Modelfile for Ollama, read back whole, and run in llama.cpp where that is at hand."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

from gguf import GGMLQuantizationType

from factorctl.checkpoint.builder import ArtefactBuilder
from factorctl.errors import UsageError
from factorctl.exporting.check.gguf_proof import check_gguf, prove_gguf
from factorctl.exporting.check.llama_cpp import has_llama_cpp, require_llama_cpp
from factorctl.exporting.check.tokens import check_tokens, token_questions
from factorctl.exporting.forms import stored_dtype
from factorctl.exporting.gguf.file import GGUF_NAME, fallbacks, planned_bytes, write_gguf
from factorctl.exporting.gguf.identity import Identity, identity_of
from factorctl.exporting.gguf.llama_quantizer import MIXED, fits, require_quantizer
from factorctl.exporting.gguf.modelfile import modelfile
from factorctl.exporting.gguf.tensors import PLAIN_QUANTS, GgufLayout, storage_type
from factorctl.exporting.gguf.tokenizer import read_tokenizer
from factorctl.exporting.jobs import ExportJob, Verified
from factorctl.exporting.stock.shards import planned_tensors
from factorctl.files.publishing import writable
from factorctl.progress import Progress

PLAIN_NAME = "plain.gguf"
"""What llama.cpp's quantiser is given; gone when it is done."""


class GgufWriter:
    """Writer of `--to gguf`."""

    num_shards = 0

    def __init__(self, job: ExportJob) -> None:
        assert isinstance(job.form.layout, GgufLayout)
        if job.config.verify_gguf:
            require_llama_cpp()
        self.job, self.layout, self.quant = job, job.form.layout, job.form.dtype
        self.quantizer = require_quantizer(self.quant) if self.quant in MIXED else None
        self.written_as = PLAIN_QUANTS[stored_dtype(job.config, job.reader)] if self.quantizer else self.quant
        self.vocab_size = int(job.checkpoint.dense.config.vocab_size)
        self.tokenizer = read_tokenizer(
            job.checkpoint.path, vocab_size=self.vocab_size, config=job.checkpoint.dense.config
        )
        if self.tokenizer.is_rebuilt and not has_llama_cpp():
            raise UsageError(
                "the source has no tokenizer.model; its scores can be derived from tokenizer.json, but only llama.cpp "
                "can say whether it then makes the same tokens, and it is not here",
                "pip install xllamacpp, or add the source's tokenizer.model to the checkpoint",
            )
        stored = {self.quant, self.written_as}
        self.weight_bytes = sum(planned_bytes(self.layout, job.reader, quant) for quant in stored)
        self.notes = self._remarks()

    @cached_property
    def identity(self) -> Identity:
        checkpoint = self.job.checkpoint
        return identity_of(
            checkpoint.manifest.source,
            checkpoint.dense.raw,
            self.job.licences,
            list(planned_tensors(self.layout, self.job.reader)),
            notation=checkpoint.spec.shape.notation,
            num_experts=checkpoint.spec.shape.num_experts,
        )

    def write(self, builder: ArtefactBuilder, progress: Progress) -> None:
        written = builder.partial / (PLAIN_NAME if self.quantizer else GGUF_NAME)
        write_gguf(
            written,
            self.layout,
            self.job.checkpoint.spec,
            self.job.reader,
            self.tokenizer,
            identity=self.identity,
            quant=self.written_as,
            progress=progress,
        )
        if self.quantizer is not None:
            with progress.stage(f"Quantising in {self.quantizer.name}"):
                self.quantizer.quantise(written, builder.partial / GGUF_NAME, self.quant)
            with writable(written):
                written.unlink()
        builder.adopt_file(GGUF_NAME)
        builder.write_file("Modelfile", modelfile(self.tokenizer).encode())
        for path in self.job.licences:
            builder.copy_file(path)

    def verify(self, builder: ArtefactBuilder, progress: Progress) -> Verified:
        path = builder.partial / GGUF_NAME
        with progress.stage("Reading it back"):
            bits = check_gguf(path, self.layout, self.job.reader, self.quant)
        questions = token_questions(self.tokenizer)
        verified, answer = prove_gguf(
            self.job,
            path,
            progress,
            texts=questions.texts,
            fragments=questions.fragments,
            ends=self.tokenizer.special.ends,
        )
        notes = () if answer is None else tuple(check_tokens(self.tokenizer, questions, answer))
        return replace(verified, notes=notes, bits_per_weight=bits)

    def _remarks(self) -> list[str]:
        notes = []
        if self.quantizer is not None:
            notes += self._remarks_on_mixture(self.quantizer.name)
        elif narrow := fallbacks(self.layout, self.job.reader, self.quant):
            notes.append(
                f"{narrow} tensors stay f16: their rows are no whole number of {self.quant} blocks "
                f"(expert_size {self.job.checkpoint.spec.shape.expert_size})"
            )
        if left_out := self.tokenizer.special.left_out:
            notes.append(
                f"{len(left_out)} added tokens are not in the file, since the model embeds none for them: "
                f"{', '.join(left_out[:3])}"
            )
        if unnamed := self.tokenizer.special.unnamed_ends:
            names = ", ".join(self.tokenizer.tokens[token] for token in unnamed)
            notes.append(f"a GGUF file names three ends of text; beyond them {names} ends one where llama.cpp knows it")
        if self.tokenizer.is_rebuilt:
            notes.append("the source has no tokenizer.model: its scores are derived from the merges of tokenizer.json")
        if not has_llama_cpp():
            notes.append("llama.cpp is not at hand (pip install xllamacpp): the file is read back, not run")
        return notes

    def _remarks_on_mixture(self, quantizer: str) -> list[str]:
        notes = [f"quantised by {quantizer}"]
        planned = planned_tensors(self.layout, self.job.reader)
        kinds = [(tensor.shape, storage_type(tensor.name, tensor.shape, self.quant)) for tensor in planned]
        matrices = [shape for shape, kind in kinds if kind is not GGMLQuantizationType.F32]
        if wide := sum(not fits(shape, MIXED[self.quant]) for shape in matrices):
            notes.append(
                f"{wide} of {len(matrices)} matrices have rows that are no multiple of 256, as K-quants need: they are "
                "stored in larger types"
            )
        return notes
