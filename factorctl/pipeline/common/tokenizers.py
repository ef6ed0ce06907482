"""The tokenizer of a model directory, or a word of what is wrong with it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from factorctl.errors import UsageError, in_one_line
from factorctl.files.first_bytes import refuse_pointer
from factorctl.pipeline.common.embedded_tokens import with_rows_alone
from factorctl.pipeline.common.special_tokens import complete_special_tokens

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""One of them holds the vocabulary."""


def has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer(
    directory: Path, *, hint: str, config: PretrainedConfig | None = None, rows: int | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer in `directory`.

    Args:
        hint: what to do where it cannot be read.
        config: the model's, where the directory's own is none that transformers knows.
        rows: of the embedding; added tokens that none of them stands for are left out.

    Raises:
        UsageError: there is none, transformers cannot read it, or it uses tokens that the model does not have.
    """
    for name in (*TOKENIZER_FILES, "tokenizer_config.json"):
        refuse_pointer(directory / name)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, config=config)
        complete_special_tokens(tokenizer, directory, config)
        tokenizer("a")  # some faults show only in use
    except Exception as error:  # transformers and tokenizers raise what they like for a damaged file
        raise UsageError(
            f"{directory} has no tokenizer that transformers can read: {in_one_line(error)}",
            _missing_package(directory, str(error)) or hint,
        ) from error
    return tokenizer if rows is None else with_rows_alone(tokenizer, rows, directory)


def _missing_package(directory: Path, reason: str) -> str | None:
    """The package that a tokenizer.model without a tokenizer.json takes; transformers' own message may name another."""
    if not (directory / "tokenizer.model").is_file() or (directory / "tokenizer.json").is_file():
        return None
    if not _is_installed("google.protobuf"):
        return "tokenizer.model is read through protobuf: pip install protobuf"
    if "tiktoken" in reason and not _is_installed("tiktoken"):
        return "this tokenizer.model is tiktoken's: pip install tiktoken"
    return None


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it lies in
        return False
