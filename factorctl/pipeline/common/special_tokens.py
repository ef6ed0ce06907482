"""The special tokens of a tokenizer, from all files that may name them.

transformers reads tokenizer_config.json, special_tokens_map.json and tokenizer.json. Some checkpoints name their end
of text in generation_config.json or config.json alone; without it none would stand between documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from factorctl.files.strict_json import read_json_object

NAMED_BY_CONFIGS = ("bos_token", "eos_token")


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
