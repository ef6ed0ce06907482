"""Documents to token ids, in batches, and without packing for perplexity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from factorctl.data.account import SourceAccount, open_accounts
from factorctl.data.conversations import templated_text
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
    domain: str | None = None


def encode_documents(
    documents: Iterator[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    append_eos: bool,
    accounts: Mapping[str, SourceAccount],
) -> Iterator[tuple[Document, list[int]]]:
    """Each document with its ids, special tokens as the tokenizer adds them by itself (BOS in front for Llama).

    With `append_eos` the ids end with EOS, once, where the tokenizer has one. Two kinds of documents bring their own
    ends: ids that were sampled (a text cut at its length has no end to teach), and conversations that a chat template
    wrote. One that the template refuses is passed over.
    """
    eos = tokenizer.eos_token_id if append_eos else None
    for batch in _batched(documents):
        written = [_written(document, tokenizer, accounts[document.source]) for document in batch]
        plain = iter(_encode([text for kind, text in written if kind == "plain"], tokenizer))
        templated = iter(_encode([text for kind, text in written if kind == "templated"], tokenizer, special=False))
        for document, (kind, _) in zip(batch, written, strict=True):
            if kind == "ids" and document.tokens is not None:
                yield document, list(document.tokens)
            elif kind == "templated":
                yield document, next(templated)
            elif kind == "plain":
                ids = next(plain)
                yield document, [*ids, eos] if eos is not None and ids and ids[-1] != eos else ids


def _written(
    document: Document, tokenizer: PreTrainedTokenizerBase, account: SourceAccount
) -> tuple[Literal["ids", "plain", "templated", "refused"], str]:
    """How a document becomes ids, and the text that is encoded."""
    if document.tokens is not None:
        return "ids", ""
    if document.messages is None:
        return "plain", document.text
    if tokenizer.chat_template is None:
        account.take("turns one behind the other without roles, as the tokenizer has no chat template")
        return "plain", document.text
    account.take("turns as the tokenizer's chat template writes them")
    try:
        return "templated", templated_text(document.messages, tokenizer)
    except ValueError as error:
        account.omit(f"the tokenizer's chat template refuses the conversation: {error}", document.id)
        return "refused", ""


def tokenize_documents(
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int | None = None,
    max_document_tokens: int | None = None,
    seed: int = 0,
    accounts: Mapping[str, SourceAccount] | None = None,
    progress: Progress | None = None,
) -> list[TokenizedDocument]:
    """The documents of `spec` one by one for perplexity, in deterministic order, up to `max_tokens` in all.

    Ids hold what the tokenizer adds by itself (a BOS for Llama) and no EOS behind; the last document may be cut.
    A document of fewer than two tokens predicts nothing and is left out. With `max_document_tokens` each is cut to its
    beginning, so that the same number of tokens comes from more documents. `accounts` keep what was read and
    what was passed over.

    Raises:
        UsageError: there is no text; else as `iter_documents` does.
    """
    progress = progress or SilentProgress()
    taken: list[TokenizedDocument] = []
    left = max_tokens
    spec = pin_revisions(spec)
    accounts = open_accounts(spec, progress) if accounts is None else accounts
    documents = iter_documents(spec, seed=seed, accounts=accounts, progress=progress)
    with progress.stage("Tokenising", total=max_tokens, unit="tokens") as task:
        for document, ids in encode_documents(documents, tokenizer, append_eos=False, accounts=accounts):
            kept = ids[:max_document_tokens]
            kept = kept if left is None else kept[:left]
            if len(kept) < 2:
                continue
            taken.append(TokenizedDocument(document.id, document.source, kept, document.domain))
            task.advance(len(kept), documents=len(taken))
            if left is not None:
                left -= len(kept)
                if left < 2:
                    break
    for account in accounts.values():
        account.close()
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


def _encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, special: bool = True) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=special,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _names(spec: DataSpec) -> str:
    return ", ".join(f"'{source.name}'" for source in spec.sources)
