"""From a prompt as typed, or a file of them, to the token ids that both models are given."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from factorctl.data.local_files import read_json_lines
from factorctl.data.spec import format_suffix
from factorctl.errors import IntegrityError, UsageError, in_one_line

EXAMPLE = '{"prompt": "The capital of France is"}'
_WRITE_PROMPTS = f"write one prompt a line, or, in a .jsonl file, one {EXAMPLE} a line"


@dataclass(frozen=True)
class Prompt:
    """A prompt, ready for both models."""

    text: str
    """As it was typed."""
    ids: list[int]


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: its lines that are not blank, or the field `prompt` of JSON lines.

    Raises:
        UsageError: the file cannot be read, or holds no prompt.
        IntegrityError: a line of a .jsonl file is no JSON object, or the text is no UTF-8.
    """
    if not os.path.isfile(path):
        raise UsageError(f"--prompts {path} is no file", _WRITE_PROMPTS)
    rows = _json_prompts(path) if format_suffix(path.name) == ".jsonl" else _lines(path)
    prompts = [text for text in rows if text.strip()]
    if not prompts:
        raise UsageError(f"--prompts {path} holds no prompt", _WRITE_PROMPTS)
    return prompts


def _lines(path: Path) -> Iterator[str]:
    try:
        yield from path.read_text(encoding="utf-8").split("\n")  # str.splitlines would split at U+2028 too
    except UnicodeDecodeError as error:
        raise IntegrityError(f"{path} is not UTF-8 text (byte {error.start + 1})", _WRITE_PROMPTS) from error


def _json_prompts(path: Path) -> Iterator[str]:
    for number, row in read_json_lines(path, EXAMPLE):
        prompt = row.get("prompt")
        if not isinstance(prompt, str):
            found = "no field `prompt`" if "prompt" not in row else "a field `prompt` that holds no text"
            raise UsageError(f"{path}, line {number} has {found}", f"write {EXAMPLE}")
        yield prompt


def takes_chat(tokenizer: PreTrainedTokenizerBase, wanted: bool | None, directory: Path) -> bool:
    """Whether prompts go through the chat template.

    Args:
        wanted: `--chat` or `--raw`; None where neither was given.

    Raises:
        UsageError: `--chat`, and the tokenizer has no template.
    """
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if wanted and not has_template:
        raise UsageError(
            f"the tokenizer in {directory} has no chat template",
            "leave out --chat: the models then go on with the prompt itself",
        )
    return has_template if wanted is None else wanted


def prepare(
    text: str, tokenizer: PreTrainedTokenizerBase, *, chat: bool, context: int | None, max_new_tokens: int
) -> Prompt:
    """The ids of one prompt: of a user's message and the beginning of the answer, or of the text itself.

    Args:
        context: positions that both models know; None where no limit is known.

    Raises:
        UsageError: the chat template refuses the prompt, or the context holds it or its continuation no longer.
    """
    ids = _chat_ids(text, tokenizer) if chat else [int(token) for token in tokenizer(text)["input_ids"]]
    shown = text if len(text) <= 40 else f"{text[:40]}..."
    if not ids:
        raise UsageError(f"the prompt {shown!r} is no token long", "begin with a word")
    if context is not None and len(ids) >= context:
        raise UsageError(
            f"the prompt {shown!r} is {len(ids):,} tokens long; the models know {context:,} positions",
            f"shorten it to {context - 1:,} tokens or fewer",
        )
    if context is not None and len(ids) + max_new_tokens > context:
        raise UsageError(
            f"the prompt {shown!r} is {len(ids):,} tokens long: with --max-new-tokens {max_new_tokens} it passes the "
            f"{context:,} positions that the models know",
            f"choose --max-new-tokens {context - len(ids)} or fewer, or shorten the prompt",
        )
    return Prompt(text, ids)


def _chat_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    try:
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # templates raise what they like
        raise UsageError(
            f"the chat template refuses the prompt: {in_one_line(error)}", "give the prompt as it is: --raw"
        ) from error
    return [int(token) for token in tokenizer(str(rendered), add_special_tokens=False)["input_ids"]]
