"""Proving a GGUF file: every tensor read back, its values against the checkpoint's, llama.cpp against a native model.

Read back, every tensor is there, holds what it was meant to hold, and no other is. The native model is one of the
values in the file.

llama.cpp rounds more than the file does: it rounds what is multiplied with 16-bit and quantised weights to 16 or 8 bits
too. With every expert on that is all there is; as the file is served, it decides near ties as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader

from factorctl.checkpoint.reader import CheckpointReader
from factorctl.errors import FactorctlError
from factorctl.exporting.check.comparison import Fidelity, Proof, compare, largest_error, require_near
from factorctl.exporting.check.gguf_values import GgufValues
from factorctl.exporting.check.llama_cpp import LlamaAnswer, ask_llama_cpp, has_llama_cpp, llama_cpp_name
from factorctl.exporting.check.native import NativeRun, Question, native_run, plain
from factorctl.exporting.check.near_ties import Resolution, near_ties
from factorctl.exporting.check.rounding import rounding_of
from factorctl.exporting.check.stored_values import exported_spec
from factorctl.exporting.features import features_of
from factorctl.exporting.gguf.file import gguf_context
from factorctl.exporting.gguf.llama_quantizer import MIXED
from factorctl.exporting.gguf.tensors import GgufLayout, storage_type, to_numpy
from factorctl.exporting.jobs import ExportJob, Verified
from factorctl.progress import Progress

SEQUENCES_RUN = 4
"""How many sequences llama.cpp is asked about: it gives one position per request."""
SEQUENCES_WITH_EVERY_EXPERT = 2
"""All tokens of these are judged."""
ENGINE_LIMITS = {"f32": 1e-3, "f16": 2e-2, "bf16": 1e-1}
"""Largest rms error of a sequence's logits that llama.cpp's own rounding explains, by the type that is stored."""
QUANTISED_LIMIT = 0.3
"""The same for quantised types, whose products are taken with 8-bit activations: 30 layers come to 0.06.
Unrelated logits give 1.4; finer faults are found in the values."""
TIE_NOISE = 4
"""How many times its logits' error llama.cpp's router logits may be off, relative to `LayerRouting.unit_noise_T`."""
_Q = GGMLQuantizationType
PLAIN = (_Q.F32, _Q.F16, _Q.BF16)
LARGEST_ERROR = {
    _Q.Q8_0: 0.02,
    _Q.Q6_K: 0.05,
    _Q.Q5_K: 0.1,
    _Q.Q5_1: 0.1,
    _Q.Q5_0: 0.1,
    _Q.Q4_K: 0.2,
    _Q.Q4_1: 0.2,
    _Q.Q4_0: 0.2,
    _Q.IQ4_NL: 0.2,
    _Q.Q3_K: 0.4,
    _Q.Q2_K: 0.7,
}
"""Of a matrix as llama.cpp quantised it: norm of the error over norm of the weights. Another matrix gives 1.4."""
NO_ENGINE = "factorctl, with the values read back (llama.cpp is not at hand)"


class GgufMismatchError(FactorctlError):
    """The file that was written does not hold what was meant to be in it."""


def check_gguf(path: Path, layout: GgufLayout, reader: CheckpointReader, quant: str) -> float:
    """Compare the file with the form it was made of, layer by layer.

    Returns:
        Bits per weight, over all tensors.

    Raises:
        GgufMismatchError: naming the first difference.
    """
    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    weights = sum(int(tensor.n_elements) for tensor in stored.values())
    bits = 8 * sum(int(tensor.n_bytes) for tensor in stored.values())
    for unit in range(layout.num_units):
        for name, tensor in layout.unit(unit, reader.read).items():
            found = stored.pop(name, None)
            if found is None or [int(size) for size in reversed(found.shape)] != list(tensor.shape):
                raise GgufMismatchError(
                    f"{path.name} lacks tensor {name} of {list(tensor.shape)}", "nothing was published"
                )
            wrong = _mixed_fault(found, tensor) if quant in MIXED else _fault(found, tensor, quant)
            if wrong:
                raise GgufMismatchError(f"{path.name}: tensor {name} {wrong}", "nothing was published")
    if stored:
        raise GgufMismatchError(f"{path.name} holds tensor {next(iter(stored))}, which was not meant to be there")
    return bits / weights


def _fault(found: Any, tensor: torch.Tensor, quant: str) -> str | None:
    kind = storage_type(found.name, tensor.shape, quant)
    if found.tensor_type is not kind:
        return f"is {found.tensor_type.name}, not {kind.name}"
    return None if _equals(found, tensor, kind) else "was not stored whole"


def _mixed_fault(found: Any, tensor: torch.Tensor) -> str | None:
    """llama.cpp chose the type: every matrix of it, each expert by itself, is near what it stands for."""
    kind = found.tensor_type
    if kind in PLAIN:
        return None if _equals(found, tensor, kind) else "was not stored whole"
    if kind not in LARGEST_ERROR:
        return f"is {kind.name}, which no mixture here has"
    held = torch.from_numpy(gguf.dequantize(found.data, kind)).reshape(tensor.shape)
    meant = tensor.float()
    error = (held - meant).flatten(-2).norm(dim=-1) / meant.flatten(-2).norm(dim=-1).clamp_min(1e-30)
    largest = float(error.max())
    if not largest <= LARGEST_ERROR[kind]:
        return f"is off by {largest:.2g} of its norm as {kind.name}, which may be {LARGEST_ERROR[kind]:g}"
    return None


def _equals(found: Any, tensor: torch.Tensor, kind: GGMLQuantizationType) -> bool:
    return bool(np.array_equal(found.data.reshape(-1), gguf.quantize(to_numpy(tensor), kind).reshape(-1)))


def prove_gguf(
    job: ExportJob, path: Path, progress: Progress, **tokens_asked: Any
) -> tuple[Verified, LlamaAnswer | None]:
    """Hold the file's values against the checkpoint's and, where it is at hand, llama.cpp against these values.

    Args:
        tokens_asked: what `ask_llama_cpp` is to tokenise besides.

    Raises:
        GgufValueError: a value is not what it stands for.
        LlamaCppError: llama.cpp does not take the file.
        ExportMismatchError: llama.cpp computes something else.
    """
    dense, spec = job.checkpoint.dense, exported_spec(job)
    values = GgufValues(path, dense, job.checkpoint.spec, job.reader, job.shifts)
    with progress.stage("Comparing its values"):
        values.check()
    length = gguf_context(features_of(dense)) - 1  # one token is generated
    question = plain([ids[:length] for ids in job.sequences[:SEQUENCES_RUN]])
    with progress.stage("Running the native checkpoint"):
        native = native_run(dense, job.native_spec, job.reader.read, question, device=job.device)
        ours = native_run(dense, spec, values.read, question, device=job.device)
        rounding = rounding_of(dense, spec, values.read, question, native=native, rounded=ours, device=job.device)
    rounded = None if job.form.fidelity is Fidelity.EXACT else rounding
    if not has_llama_cpp():
        return Verified(NO_ENGINE, compare(native.logits, ours.logits), rounding=rounded), None
    with progress.stage("Running it in llama.cpp"):
        answer = ask_llama_cpp(path, question.sequences, vocab_size=int(dense.config.vocab_size), **tokens_asked)
        proof = _proof(job, path, values, question, ours, answer)
    return Verified(llama_cpp_name(), compare(native.logits, answer.successors), proof=proof, rounding=rounded), answer


def _proof(
    job: ExportJob, path: Path, values: GgufValues, question: Question, ours: NativeRun, answer: LlamaAnswer
) -> Proof:
    dense, spec, limit = job.checkpoint.dense, exported_spec(job), ENGINE_LIMITS.get(job.form.dtype, QUANTISED_LIMIT)
    all_experts_error = None
    if ours.routing:
        asked = plain(question.sequences[:SEQUENCES_WITH_EVERY_EXPERT])
        smooth = native_run(dense, spec, values.read, asked, every_expert=True, device=job.device)
        with every_expert_on(path, spec.shape.num_experts):
            theirs = ask_llama_cpp(path, asked.sequences, vocab_size=int(dense.config.vocab_size))
        all_experts_error = largest_error(smooth.logits, theirs.successors)
        require_near(all_experts_error, limit, "with every expert on")
    lengths = [len(ids) for ids in question.sequences]
    ties = near_ties(ours.routing, lengths, Resolution(1e-6, TIE_NOISE * (all_experts_error or 0.0)))
    served_error = largest_error(ours.logits, answer.successors, ties.sound)
    require_near(served_error, limit, "as it is served, before any near tie of routing")
    return Proof(all_experts_error, served_error, sum(ties.sound), sum(lengths), ties.share)


@contextmanager
def every_expert_on(path: Path, num_experts: int) -> Iterator[None]:
    """The number of active experts changed in the file itself, four bytes, and back again."""
    before = _set_active(path, num_experts)
    try:
        yield
    finally:
        _set_active(path, before)


def _set_active(path: Path, count: int) -> int:
    """Write the number of active experts into the header; gives the one that was there."""
    reader = GGUFReader(path, "r+")
    field = next(field for name, field in reader.fields.items() if name.endswith(".expert_used_count"))
    before = int(field.parts[field.data[0]][0])
    field.parts[field.data[0]][0] = count
    reader.data.flush()
    return before
