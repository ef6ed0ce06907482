"""The texts of an evaluation: read, cut to size and tokenised before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from factorctl.config.evaluate import EvalConfig
from factorctl.data.account import open_accounts
from factorctl.data.hub import pin_revisions
from factorctl.data.identity import identify_sources, tokenizer_fingerprint
from factorctl.data.row_filter import split_filter
from factorctl.data.spec import parse_data_spec
from factorctl.data.tokenizing import tokenize_documents
from factorctl.errors import UsageError
from factorctl.evaluation.perplexity import TextDocument
from factorctl.progress import Progress

FIDELITY_TOKENS = 4096
FIDELITY_LENGTH = 512


@dataclass(frozen=True)
class EvalText:
    """One text for perplexity, as token ids."""

    name: str
    documents: list[TextDocument]
    identity: Mapping[str, Any]

    @property
    def tokens(self) -> int:
        return sum(len(document.ids) for document in self.documents)


def text_names(data: Sequence[str]) -> dict[str, str]:
    """A short name -> DATA as it was given: a file's name without its ending, where that is no other's too.

    A condition on rows stays with the name.
    """
    given = list(dict.fromkeys(data))
    short = [_short_name(text) for text in given]
    return {name if name and short.count(name) == 1 else text: text for name, text in zip(short, given, strict=True)}


def _short_name(text: str) -> str:
    place, rows = split_filter(text) if not Path(text).exists() else (text, None)
    name = Path(place).name.partition(".")[0] if Path(place).is_file() else place
    return name if rows is None or not name else f"{name}:{rows}"


def read_text(
    name: str, given: str, config: EvalConfig, tokenizer: PreTrainedTokenizerBase, progress: Progress
) -> EvalText:
    spec = parse_data_spec(given, text_field=config.text_field)
    if spec.uses_self:
        raise UsageError(
            "--data self is no text to evaluate on: it would measure the model on what it writes itself",
            "give text that the model did not write",
        )
    spec = pin_revisions(spec)
    accounts = open_accounts(spec, progress)
    found = tokenize_documents(
        spec,
        tokenizer,
        max_tokens=config.data_tokens,
        max_document_tokens=config.document_tokens,
        seed=config.seed,
        accounts=accounts,
        progress=progress,
    )
    sources = zip(spec.sources, identify_sources(spec, None, progress), strict=True)
    identity = {
        "sources": [record | accounts[source.name].record for source, record in sources],
        "text_field": config.text_field,
        "tokens": config.data_tokens,
        "document_tokens": config.document_tokens,
        "seed": config.seed,
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }
    return EvalText(name, [TextDocument(one.id, one.ids, one.domain) for one in found], identity)


def fidelity_ids(text: EvalText, window: int) -> torch.Tensor:
    """About `FIDELITY_TOKENS` tokens of a text as windows of one length, none across documents, [B, L]."""
    length = min(FIDELITY_LENGTH, window, max(len(document.ids) for document in text.documents))
    rows: list[Sequence[int]] = []
    for document in text.documents:
        whole = len(document.ids) // length
        rows += [document.ids[length * index : length * (index + 1)] for index in range(whole)]
        if len(rows) * length >= FIDELITY_TOKENS:
            break
    return torch.tensor([list(row) for row in rows[: max(1, FIDELITY_TOKENS // length)]])
