"""The texts of a search: calibration tokens as `factorize` takes them, and held-out documents that it never sees.

Without a text of its own (`--data`) a search holds out the documents of the calibration text that calibration did not
come to, in the same order. So a later `factorize` with the same options calibrates on the very same tokens, and not on
those that judged. From `self` more documents are drawn, with another seed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from factorctl.data.blocks import TokenBlocks
from factorctl.data.spec import parse_data_spec
from factorctl.data.tokenizing import tokenize_documents
from factorctl.errors import UsageError
from factorctl.evaluation.perplexity import TextDocument
from factorctl.files.hashing import hash_value
from factorctl.pipeline.common.calibration import calibration_blocks, source_blocks
from factorctl.pipeline.common.source_tokenizer import ADD_TOKENIZER
from factorctl.pipeline.common.tokenizers import load_tokenizer
from factorctl.pipeline.frontier.plan import FrontierPlan
from factorctl.progress import Progress

BEGINNING = 64
"""Documents that begin with the same so many tokens are taken for copies of one another."""


@dataclass(frozen=True)
class SearchTexts:
    """What splits are fitted to, and what they are judged on."""

    calibration_BL: torch.Tensor
    heldout: list[TextDocument]
    heldout_name: str
    fingerprint: str

    @property
    def stream(self) -> torch.Tensor:
        """The held-out tokens in a row: what speed is measured on."""
        return torch.tensor([token for document in self.heldout for token in document.ids])


def read_texts(plan: FrontierPlan, description: dict[str, object], progress: Progress) -> SearchTexts:
    """Both texts, tokenised.

    Raises:
        UsageError: one of them has no text, or nothing is left of the calibration text to hold out.
    """
    config = plan.config
    blocks = calibration_blocks(plan.source, plan.dense, description, plan.base.config, progress)
    if config.data is None and parse_data_spec(config.calibration).uses_self:
        progress.note("quality is measured on text that the model samples itself; give --data for your own")
        drawn = replace(
            plan.base.config, calibration="self", calibration_tokens=config.data_tokens, seed=config.seed + 1
        )
        more = source_blocks(plan.source, plan.dense, description, drawn, progress).train
        heldout = [TextDocument(str(row), [int(token) for token in ids]) for row, ids in enumerate(more)]
        name = "self, another seed"
    else:
        heldout = _unseen_documents(plan, blocks, progress)
        name = config.data or f"{config.calibration}, documents that calibration did not come to"
    return SearchTexts(
        calibration_BL=torch.from_numpy(blocks.train.astype("int64")),
        heldout=heldout,
        heldout_name=name,
        fingerprint=hash_value([blocks.fingerprint, [list(document.ids) for document in heldout]]),
    )


def _unseen_documents(plan: FrontierPlan, blocks: TokenBlocks, progress: Progress) -> list[TextDocument]:
    """Documents of the held-out text, each cut to one window, without those that calibration saw."""
    config = plan.config
    given = config.data or config.calibration
    tokenizer = load_tokenizer(plan.source.path, hint=ADD_TOKENIZER, rows=int(plan.dense.config.vocab_size))
    documents = tokenize_documents(
        parse_data_spec(given, text_field=config.text_field, option="--data"),
        tokenizer,
        max_tokens=config.data_tokens + blocks.documents * plan.window,
        max_document_tokens=plan.window,
        seed=config.seed,
        progress=progress,
    )
    seen = _beginnings(blocks, tokenizer.eos_token_id)
    lengths = {len(beginning) for beginning in seen}
    unseen = [d for d in documents if not any(tuple(d.ids[:length]) in seen for length in lengths)]
    kept: list[TextDocument] = []
    left = config.data_tokens
    for document in unseen:
        ids = document.ids[:left]
        if len(ids) >= 2:
            kept.append(TextDocument(document.id, ids))
            left -= len(ids)
    if not kept:
        raise UsageError(
            f"all documents of {given} were calibrated on: none is left to judge splits by",
            "give held-out text of its own (--data DATA), or lower --calibration-tokens",
        )
    if left > 0:
        progress.note(
            f"{config.data_tokens - left:,} tokens are left to judge splits by; {config.data_tokens:,} were asked for"
        )
    return kept


def _beginnings(blocks: TokenBlocks, eos: int | None) -> set[tuple[int, ...]]:
    """How every calibration document begins, without the end of text behind short ones."""
    tokens = blocks.train.reshape(-1)
    ends = [*blocks.train_starts[1:], len(tokens)]
    found = set()
    for start, end in zip(blocks.train_starts, ends, strict=True):
        ids = [int(token) for token in tokens[start : min(end, start + BEGINNING)]]
        found.add(tuple(ids[:-1] if ids[-1:] == [eos] else ids))
    return found - {()}
