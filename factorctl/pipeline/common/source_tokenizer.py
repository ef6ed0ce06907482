"""The tokenizer that a checkpoint takes from its source: decided on before a layer is factored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from factorctl.errors import UsageError
from factorctl.models.families import DenseModel
from factorctl.pipeline.common.embedded_tokens import SUPERSEDED, saved_files, tokens_without_row, with_rows_alone
from factorctl.pipeline.common.tokenizers import has_tokenizer, load_tokenizer
from factorctl.progress import Progress

WITHOUT_CALIBRATION = (
    "choose options that need no calibration: --experts N --router random, without --refit and --shared-fraction"
)
ADD_TOKENIZER = f"add the model's tokenizer files, or {WITHOUT_CALIBRATION}"


@dataclass(frozen=True)
class SourceTokenizer:
    """What becomes of the source's tokenizer files: copied, but for these."""

    superseded: tuple[str, ...] = ()
    """Names of files that are not copied."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """What is written instead."""


def source_tokenizer(directory: Path, dense: DenseModel, *, needed: bool, progress: Progress) -> SourceTokenizer:
    """Hold the tokenizer of a source against its embeddings.

    Raises:
        UsageError: it is needed and cannot be read, or uses tokens that the model does not have.
    """
    if not has_tokenizer(directory) and not needed:
        return SourceTokenizer()
    rows = int(dense.config.vocab_size)
    try:
        tokenizer = load_tokenizer(directory, hint=ADD_TOKENIZER)
    except UsageError as error:
        if needed:
            raise
        progress.note(f"{error.message}; eval, finetune and export to GGUF will ask for one")
        return SourceTokenizer()
    beyond = tokens_without_row(tokenizer, rows)
    if not beyond:
        return SourceTokenizer()
    fitting = with_rows_alone(tokenizer, rows, directory)
    named = ", ".join(f"{token!r} ({index})" for token, index in list(beyond.items())[:3])
    more = f" and {len(beyond) - 3} more" if len(beyond) > 3 else ""
    progress.note(f"the model embeds {rows} tokens: {named}{more} of its tokenizer has no row there and is left out")
    return SourceTokenizer(SUPERSEDED, saved_files(fitting))
