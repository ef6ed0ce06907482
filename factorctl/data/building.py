"""From DATA to token blocks: read, tokenise once, hold documents out, pack, cache by content."""

from __future__ import annotations

import errno
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from factorctl.data.account import SourceAccount, open_accounts, say_record, say_splits
from factorctl.data.block_files import BlockWriter, write_meta
from factorctl.data.blocks import TokenBlocks, open_token_blocks
from factorctl.data.documents import Document
from factorctl.data.hub import pin_revisions
from factorctl.data.identity import hash_json, identify_sources, tokenizer_fingerprint
from factorctl.data.mixing import iter_documents
from factorctl.data.packing import BlockPlan, Filling, pack_documents
from factorctl.data.spec import DataSpec
from factorctl.data.tokenizing import encode_documents
from factorctl.errors import IntegrityError, ResourceError, UsageError
from factorctl.files.publishing import OF_CACHES, cache_entry, sole_writer
from factorctl.progress import Progress, SilentProgress

CACHE_VERSION = 2
"""Raised whenever the same input would give other blocks."""


class TextSampler(Protocol):
    """Where the documents of `self` come from."""

    @property
    def fingerprint(self) -> str:
        """Hash of the model and of all that decides its samples."""
        ...

    @property
    def document_length(self) -> int:
        """The most tokens of one document."""
        ...

    def __call__(self, *, tokens: int, seed: int, progress: Progress) -> Iterator[Document]:
        """Documents of at least `tokens` tokens in all, the same for the same seed."""
        ...


def build_token_blocks(
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_length: int,
    tokens: int,
    seed: int,
    cache_dir: Path,
    heldout_fraction: float = 0.02,
    max_document_tokens: int | None = None,
    allow_fewer: bool = False,
    purpose: str = "calibration",
    sampler: TextSampler | None = None,
    progress: Progress | None = None,
) -> TokenBlocks:
    """Blocks with at least `tokens` training tokens, from the cache where the same text was tokenised before.

    Args:
        tokens: training tokens, rounded up to whole blocks; held-out tokens come on top.
        heldout_fraction: held-out tokens as a share of `tokens`, at least one block; 0 holds none out.
        max_document_tokens: cut longer documents, so that a few of them do not crowd out the rest.
        allow_fewer: take what there is where the text ends early; the caller reads `TokenBlocks.tokens`.
        purpose: word for messages: 'calibration' or 'training'.
        sampler: makes the documents of `self`.

    Raises:
        UsageError: no text, too little of it, or a fault of the request.
        IntegrityError: a file of the text is corrupt.
        ResourceError: no disk space, or the Hub cannot be reached.
    """
    shown = progress or SilentProgress()
    plan = BlockPlan(block_length, tokens, seed, heldout_fraction, max_document_tokens)
    if spec.uses_self and sampler is None:
        raise UsageError("`self` needs the dense model to sample from, and none is at hand here", "give text instead")
    spec = pin_revisions(spec)
    identity = {
        "cache_version": CACHE_VERSION,
        "plan": asdict(plan),
        "text_field": spec.text_field,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "sources": identify_sources(spec, sampler.fingerprint if sampler else None, shown),
    }
    final = cache_dir / hash_json(identity)
    with _writable(cache_dir), sole_writer(final, wait=True):
        blocks = _open_cached(final, shown)
        if blocks is not None:
            _say_again(blocks, spec, plan, shown)
        else:
            blocks = _build(spec, tokenizer, plan, sampler, identity, final, purpose, shown)
    if blocks.tokens < plan.train_tokens and not allow_fewer:
        raise _too_few_tokens(blocks, plan, purpose)
    return blocks


def _open_cached(final: Path, progress: Progress) -> TokenBlocks | None:
    if not final.exists():
        return None
    try:
        return open_token_blocks(final)
    except IntegrityError as error:
        progress.note(f"{error.message}; it is built again")
        shutil.rmtree(final)
        return None


def _build(
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerBase,
    plan: BlockPlan,
    sampler: TextSampler | None,
    identity: dict[str, Any],
    final: Path,
    purpose: str,
    progress: Progress,
) -> TokenBlocks:
    with cache_entry(final) as directory:
        accounts = open_accounts(spec, progress)
        filling, parts = _write_parts(directory, spec, tokenizer, plan, sampler, accounts, progress)
        longer = filling.longer_documents()
        if longer is not None:
            progress.note(_longer_note(longer, plan.max_document_tokens))
            plan = replace(plan, max_document_tokens=longer)
            accounts = open_accounts(spec, SilentProgress())
            filling, parts = _write_parts(directory, spec, tokenizer, plan, sampler, accounts, progress)
        _check_blocks(spec, plan, filling, parts, purpose)
        write_meta(directory, _meta(spec, plan, identity, filling, accounts, final.name) | parts)
    return open_token_blocks(final)


def _write_parts(
    directory: Path,
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerBase,
    plan: BlockPlan,
    sampler: TextSampler | None,
    accounts: Mapping[str, SourceAccount],
    progress: Progress,
) -> tuple[Filling, dict[str, dict[str, int]]]:
    """Read the text into the two parts; how far they are filled, and what each holds."""
    dtype = "uint16" if max(tokenizer.get_vocab().values()) < 1 << 16 else "uint32"
    with (
        BlockWriter(directory, "train", plan.block_length, dtype) as train,
        BlockWriter(directory, "heldout", plan.block_length, dtype) as heldout,
    ):
        filling = _fill(spec, tokenizer, plan, sampler, accounts, train, heldout, progress)
        for account in accounts.values():
            account.close()
        return filling, {"train": train.finish(), "heldout": heldout.finish()}


def _say_again(blocks: TokenBlocks, spec: DataSpec, plan: BlockPlan, progress: Progress) -> None:
    """What was said when cached blocks were made."""
    say_splits(spec, progress)
    for source in blocks.sources:
        say_record(source, progress)
    if blocks.meta["document_tokens"] != plan.max_document_tokens:
        progress.note(_longer_note(blocks.meta["document_tokens"], plan.max_document_tokens))


def _longer_note(longer: int, cap: int | None) -> str:
    return f"the text is short: up to {longer:,} tokens of a document are read, instead of its first {cap:,}"


@contextmanager
def _writable(cache: Path) -> Iterator[None]:
    """Turn the system's refusals to write into errors that say what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ResourceError(
                f"no space left while writing the token cache {cache}", "free some disk space and run it again"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ResourceError(f"the token cache {cache} cannot be written: {error.strerror}", OF_CACHES) from error
        raise


def _fill(
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerBase,
    plan: BlockPlan,
    sampler: TextSampler | None,
    accounts: Mapping[str, SourceAccount],
    train: BlockWriter,
    heldout: BlockWriter,
    progress: Progress,
) -> Filling:
    total = plan.train_tokens + plan.heldout_tokens
    sampled = None
    if sampler is not None and spec.uses_self:
        # one document more than the sum: what a part has no room for is cut off
        needed = math.ceil(total * spec.self_share) + sampler.document_length
        sampled = sampler(tokens=needed, seed=plan.seed, progress=progress)
    documents = iter_documents(spec, seed=plan.seed, sampled=sampled, accounts=accounts, progress=progress)
    encoded = encode_documents(documents, tokenizer, append_eos=True, accounts=accounts)
    shown = SilentProgress() if spec.self_share == 1 else progress  # sampling draws its own bar
    with shown.stage("Tokenising", total=total, unit="tokens") as task:
        return pack_documents(encoded, plan, len(spec.sources), {"train": train, "heldout": heldout}, task)


def _meta(
    spec: DataSpec,
    plan: BlockPlan,
    identity: dict[str, Any],
    filling: Filling,
    accounts: Mapping[str, SourceAccount],
    fingerprint: str,
) -> dict[str, Any]:
    sources = [
        record
        | accounts[source.name].record
        | {
            "name": source.name,
            "documents": filling.documents[source.name],
            "tokens": filling.used[source.name, "train"],
            "heldout_tokens": filling.used[source.name, "heldout"],
        }
        for source, record in zip(spec.sources, identity["sources"], strict=True)
    ]
    available = {
        "block_length": plan.block_length,
        "document_tokens": plan.max_document_tokens,
        "available_tokens": filling.available_tokens,
    }
    return identity | available | {"sources": sources, "fingerprint": fingerprint}


def _check_blocks(
    spec: DataSpec, plan: BlockPlan, filling: Filling, parts: dict[str, dict[str, int]], purpose: str
) -> None:
    """Refuse a text that fills not even one block of each part."""
    names = ", ".join(f"'{source.name}'" for source in spec.sources)
    if filling.available_tokens == 0:
        raise UsageError(f"the {purpose} text {names} is empty", "give files that hold text, or use `self`")
    if parts["train"]["blocks"] == 0 or (plan.heldout_tokens and parts["heldout"]["blocks"] == 0):
        beside = ", and a block of other documents to hold out" if plan.heldout_tokens else ""
        shorter = ", choose a shorter --block-length" if purpose == "training" else ""
        documents = "1 document" if filling.seen_documents == 1 else f"{filling.seen_documents:,} documents"
        raise UsageError(
            f"the {purpose} text {names} gives {filling.available_tokens:,} tokens in {documents}; "
            f"it takes at least a block of {plan.block_length:,} tokens{beside}",
            f"give more text or more documents{shorter}, or use `self`",
        )


def _too_few_tokens(blocks: TokenBlocks, plan: BlockPlan, purpose: str) -> UsageError:
    beside = f", and {plan.heldout_tokens:,} more to hold out" if plan.heldout_tokens else ""
    return UsageError(
        f"the {purpose} text gives {blocks.meta['available_tokens']:,} tokens; {plan.tokens:,} were asked for{beside}",
        f"give more text, ask for {blocks.tokens:,} tokens or fewer, or use `self` (text that the model samples)",
    )
