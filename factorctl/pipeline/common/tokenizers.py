"""The tokenizer of a model directory, its special tokens from all files that may name them, or what is wrong with it.

transformers reads tokenizer_config.json, special_tokens_map.json and tokenizer.json. Some checkpoints name their end
of text in generation_config.json or config.json alone; without it none would stand between documents.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from factorctl.errors import UsageError, in_one_line
from factorctl.files.first_bytes import refuse_failed_download
from factorctl.files.strict_json import read_json_object
from factorctl.pipeline.common.embedded_tokens import with_rows_alone

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""One of them holds the vocabulary."""
NAMED_BY_CONFIGS = ("bos_token", "eos_token")


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
        refuse_failed_download(directory / name)
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


def complete_special_tokens(
    tokenizer: PreTrainedTokenizerBase, directory: Path, config: PretrainedConfig | None = None
) -> None:
    """Give `tokenizer` the BOS and EOS that only the model's configs name.

    Configs that name none get the ids 1 and 2 from transformers, so an id counts only where the tokenizer has a special
    token there. What the tokenizer itself names is kept.
    """
    special = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    for name in NAMED_BY_CONFIGS:
        if getattr(tokenizer, name) is None:
            found = next((index for index in _ids(directory, config, f"{name}_id") if index in special), None)
            if found is not None:
                setattr(tokenizer, name, special[found])


def _ids(directory: Path, config: PretrainedConfig | None, key: str) -> Iterator[int]:
    """The ids that the configs give, generation_config.json first, in their order where there are several."""
    for said in _configs(directory, config):
        value = said.get(key)
        for index in value if isinstance(value, list) else [value]:
            if isinstance(index, int):
                yield index


def _configs(directory: Path, config: PretrainedConfig | None) -> Iterator[Mapping[str, Any]]:
    for name in ("generation_config.json", "config.json"):
        if (directory / name).is_file():
            yield read_json_object(directory / name)
    if config is not None:
        yield config.to_dict()


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
