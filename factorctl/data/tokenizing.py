"""Documents to token ids, in batches, and without packing for perplexity."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from factorctl.data.documents import Document
from factorctl.data.hub import pin_revisions
from factorctl.data.mixing import iter_documents
from factorctl.data.spec import DataSpec
from factorctl.errors import UsageError
from factorctl.progress import Progress, SilentProgress

_BATCH_CHARACTERS = 262_144
_BATCH_DOCUMENTS = 256


@dataclass(frozen=True)
class TokenizedDocument:
    """One document as token ids."""

    id: str
    source: str
    ids: list[int]


def encode_documents(
    documents: Iterator[Document], tokenizer: PreTrainedTokenizerBase, *, append_eos: bool
) -> Iterator[tuple[Document, list[int]]]:
    """Each document with its ids, special tokens as the tokenizer adds them by itself (BOS in front for Llama).

    With `append_eos` the ids end with EOS, once, where the tokenizer has one. A document that brings its ids keeps
    them as they are: a sampled text that was cut at its length has no end to teach.
    """
    eos = tokenizer.eos_token_id if append_eos else None
    for batch in _batched(documents):
        texts = [document.text for document in batch if document.tokens is None]
        encoded = iter(_encode(texts, tokenizer))
        for document in batch:
            if document.tokens is not None:
                yield document, list(document.tokens)
                continue
            ids = next(encoded)
            if eos is not None and ids and ids[-1] != eos:
                ids.append(eos)
            yield document, ids


def tokenize_documents(
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int | None = None,
    max_document_tokens: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[TokenizedDocument]:
    """The documents of `spec` one by one for perplexity, in deterministic order, up to `max_tokens` in all.

    Ids hold what the tokenizer adds by itself (a BOS for Llama) and no EOS behind; the last document may be cut.
    A document of fewer than two tokens predicts nothing and is left out. With `max_document_tokens` each is cut to its
    beginning, so that the same number of tokens comes from more documents.

    Raises:
        UsageError: there is no text; else as `iter_documents` does.
    """
    progress = progress or SilentProgress()
    taken: list[TokenizedDocument] = []
    left = max_tokens
    documents = iter_documents(pin_revisions(spec), seed=seed, progress=progress)
    with progress.stage("Tokenising", total=max_tokens, unit="tokens") as task:
        for document, ids in encode_documents(documents, tokenizer, append_eos=False):
            kept = ids[:max_document_tokens]
            kept = kept if left is None else kept[:left]
            if len(kept) < 2:
                continue
            taken.append(TokenizedDocument(document.id, document.source, kept))
            task.advance(len(kept), documents=len(taken))
            if left is not None:
                left -= len(kept)
                if left < 2:
                    break
    if not taken:
        raise UsageError(f"{_names(spec)} holds no text to evaluate", "give files with at least a sentence of text")
    return taken


def _batched(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Batches large enough to keep the tokenizer's threads busy, small enough not to read far past the need."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _names(spec: DataSpec) -> str:
    return ", ".join(f"'{source.name}'" for source in spec.sources)
