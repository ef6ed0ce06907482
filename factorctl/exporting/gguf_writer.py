"""A GGUF file with a Modelfile for Ollama, read back whole, and run in llama.cpp where that is at hand."""

from __future__ import annotations

from factorctl.checkpoint.builder import ArtefactBuilder
from factorctl.errors import IntegrityError
from factorctl.exporting.comparison import compare_candidates
from factorctl.exporting.features import features_of
from factorctl.exporting.gguf_file import (
    GGUF_NAME,
    MODELFILE,
    check_gguf,
    fallbacks,
    gguf_context,
    planned_bytes,
    write_gguf,
)
from factorctl.exporting.gguf_tensors import GgufLayout
from factorctl.exporting.gguf_tokenizer import read_tokenizer
from factorctl.exporting.jobs import ExportJob, Verified
from factorctl.exporting.llama_cpp import ask_llama_cpp, has_llama_cpp, llama_cpp_name, require_llama_cpp
from factorctl.exporting.native_reference import NativeReference
from factorctl.exporting.verification_text import PASSAGES
from factorctl.progress import Progress

SEQUENCES_RUN = 4
"""How many sequences llama.cpp is asked about: it gives one position per request."""


class GgufWriter:
    """Writer of `--to gguf`."""

    num_shards = 0

    def __init__(self, job: ExportJob) -> None:
        assert isinstance(job.form.layout, GgufLayout)
        if job.config.verify_gguf:
            require_llama_cpp()
        self.job, self.layout, self.quant = job, job.form.layout, job.form.dtype
        self.vocab_size = int(job.checkpoint.dense.config.vocab_size)
        self.tokenizer = read_tokenizer(job.checkpoint.path, vocab_size=self.vocab_size)
        self.weight_bytes = planned_bytes(self.layout, job.reader, self.quant)
        self.notes = self._remarks()

    def write(self, builder: ArtefactBuilder, progress: Progress) -> None:
        write_gguf(
            builder.partial / GGUF_NAME,
            self.layout,
            self.job.checkpoint.spec,
            self.job.reader,
            self.tokenizer,
            name=f"{self.job.checkpoint.manifest.source['id']} {self.job.checkpoint.spec.shape.notation}",
            quant=self.quant,
            progress=progress,
        )
        builder.adopt_file(GGUF_NAME)
        builder.write_file("Modelfile", MODELFILE.encode())
        for path in self.job.licences:
            builder.copy_file(path)

    def verify(self, builder: ArtefactBuilder, reference: NativeReference, progress: Progress) -> Verified:
        path = builder.partial / GGUF_NAME
        with progress.stage("Reading it back"):
            check_gguf(path, self.layout, self.job.reader, self.quant)
        if not has_llama_cpp():
            return Verified("no engine: every stored tensor was read back and compared", None)
        length = gguf_context(features_of(self.job.checkpoint.dense)) - 1  # one token is generated
        sequences = [ids[:length] for ids in self.job.sequences[:SEQUENCES_RUN]]
        with progress.stage("Running it in llama.cpp"):
            answer = ask_llama_cpp(path, sequences, vocab_size=self.vocab_size, texts=PASSAGES)
        for text, theirs in zip(PASSAGES, answer.tokens, strict=True):
            ours = theirs if self.job.tokenise is None else self.job.tokenise(text)
            if ours != theirs:
                raise IntegrityError(
                    f"llama.cpp, with pre-tokenizer {self.tokenizer.pre!r}, tokenises {text[:40]!r}... as "
                    f"{theirs[:12]}...; the model's own tokenizer gives {ours[:12]}...",
                    "nothing was published; export with --to hf",
                )
        logits = [logits_LV[:length] for logits_LV in reference.logits[:SEQUENCES_RUN]]
        agreement = compare_candidates(logits, answer.successors, self.job.fidelity)
        return Verified(llama_cpp_name(), agreement)

    def _remarks(self) -> list[str]:
        notes = []
        if narrow := fallbacks(self.layout, self.job.reader, self.quant):
            notes.append(
                f"{narrow} tensors stay f16: their rows are no whole number of {self.quant} blocks "
                f"(expert_size {self.job.checkpoint.spec.shape.expert_size})"
            )
        if not has_llama_cpp():
            notes.append("llama.cpp is not at hand (pip install xllamacpp): the file is read back, not run")
        return notes
