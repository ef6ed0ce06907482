"""Tokens that no row of the embedding stands for: a [PAD] that was added and never trained, what a class brings along.

They are decided on once, when a checkpoint is factorized. Such a token that no text can do without is a fault of the
source; any other is left out, so that every later step finds a tokenizer that fits the model.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from factorctl.errors import UsageError

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_NEEDED = ("bos_token", "eos_token")
SUPERSEDED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""Files of a source that name its tokens, which a tokenizer without some of them replaces."""


def tokens_without_row(tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[str, int]:
    """Token -> id of those beyond the `rows` of the embedding, in order."""
    beyond = {token: index for token, index in tokenizer.get_vocab().items() if index >= rows}
    return dict(sorted(beyond.items(), key=lambda item: item[1]))


def with_rows_alone(tokenizer: PreTrainedTokenizerBase, rows: int, directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer without the tokens that have no row; itself where there are none.

    Raises:
        UsageError: one of them is of the vocabulary itself, begins or ends texts, or stands in a chat template.
    """
    beyond = tokens_without_row(tokenizer, rows)
    if not beyond:
        return tokenizer
    _refuse_needed(tokenizer, beyond, rows, directory)
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["id"] < rows]
    raw["padding"] = None
    roles = {role: getattr(tokenizer, role, None) for role in _ROLES}
    kept = {role: token for role, token in roles.items() if token is not None and token not in beyond}
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(raw)),
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        clean_up_tokenization_spaces=bool(getattr(tokenizer, "clean_up_tokenization_spaces", False)),
        **kept,
    )
    made.chat_template = tokenizer.chat_template
    return made


def _refuse_needed(tokenizer: PreTrainedTokenizerBase, beyond: dict[str, int], rows: int, directory: Path) -> None:
    raw: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token["content"] for token in raw["added_tokens"]}
    templates = json.dumps(tokenizer.chat_template, ensure_ascii=False) + json.dumps(
        raw.get("post_processor"), ensure_ascii=False
    )
    for token, index in beyond.items():
        found = f"token {token!r} of the tokenizer in {directory} has id {index}; the model embeds {rows} tokens"
        if token not in added:
            raise UsageError(found, "its tokenizer files belong to another model: put the right ones there")
        role = next((role for role in _NEEDED if getattr(tokenizer, role, None) == token), None)
        if role is not None and not _is_named(token, directory):  # the tokenizer's class brings it along
            continue
        if role is not None or token in templates:
            why = f"it is the {role}" if role is not None else "its template uses it"
            raise UsageError(
                f"{found}, and {why}",
                "enlarge its embeddings (resize_token_embeddings), or put its base model's tokenizer files there",
            )


def _is_named(token: str, directory: Path) -> bool:
    """Whether a file of the source names the token."""
    spelt = (token, json.dumps(token)[1:-1])
    texts = [(directory / name).read_text("utf-8") for name in SUPERSEDED if (directory / name).is_file()]
    return any(spelling in text for spelling in spelt for text in texts)


def saved_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """Name -> content of the files that transformers writes for a tokenizer."""
    with tempfile.TemporaryDirectory(prefix="factorctl-tokenizer-") as scratch:
        tokenizer.save_pretrained(scratch)
        return {path.name: path.read_bytes() for path in sorted(Path(scratch).iterdir()) if path.is_file()}
