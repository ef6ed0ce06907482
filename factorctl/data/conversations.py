"""Conversations: turns as data sets store them, and as the text that a chat model reads.

The tokenizer's own chat template writes the roles where it has one; nothing is added around what it gives. Without one
the turns stand one behind the other, a blank line between them: names of roles would be text that the model never saw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

from factorctl.data.shapes import TURN_KEYS
from factorctl.errors import UsageError

Message = Mapping[str, Any]
"""One turn: `role` and `content`, and whatever else a chat template may read (`tool_calls`, `name`)."""

ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot"),
    "tool": ("tool", "function", "ipython", "observation", "function_response"),
}
"""What chat templates call a role, and what data sets do."""
_NAMES = {name: role for role, names in ROLES.items() for name in names}
_TODAY = datetime(2025, 1, 1, tzinfo=UTC)
"""What a template that writes today's date is told, so that the same text always gives the same tokens."""
_DATE_CODES = ("%-d", "%d", "%B", "%b", "%m", "%Y", "%y", "%A", "%a", "%H", "%M", "%S")
_FIXED_DATE = (
    "{%- macro strftime_now(format) -%}{{- format"
    + "".join(f" | replace('{code}', '{_TODAY.strftime(code)}')" for code in _DATE_CODES)
    + " -}}{%- endmacro -%}"
)
"""Put in front of a template, it takes the place of transformers' function, which no argument reaches."""


def messages_of(value: object, where: str, field: str) -> tuple[Message, ...]:
    """The turns of one row.

    Raises:
        UsageError: a turn without role or content, a role that no chat template knows, or content that is no text.
    """
    turns = _side_by_side(value) if isinstance(value, Mapping) else value
    if not isinstance(turns, list | tuple):
        raise UsageError(f"{where}: field '{field}' holds no list of turns", "name another with --text-field")
    return tuple(_message(turn, f"{where}: field '{field}', turn {n}") for n, turn in enumerate(turns, start=1))


def plain_text(messages: Sequence[Message]) -> str:
    """The turns without their roles."""
    return "\n\n".join(message["content"] for message in messages if message["content"].strip())


def templated_text(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    """The turns as the tokenizer's chat template writes them, special tokens included.

    Raises:
        ValueError: the template refuses them (roles that do not alternate, a role it has no place for).
    """
    try:
        rendered = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=_FIXED_DATE + tokenizer.get_chat_template(),
            tokenize=False,
            date_string=_TODAY.strftime("%d %b %Y"),
        )
    except Exception as error:  # jinja2 raises what the template's code runs into
        raise ValueError(str(error).strip() or type(error).__name__) from error
    return str(rendered)


def _side_by_side(value: Mapping[str, Any]) -> object:
    """The turns of an object of lists, {"role": [...], "content": [...]}."""
    columns = {name: column for name, column in value.items() if isinstance(column, list | tuple)}
    if len({len(column) for column in columns.values()}) != 1:
        return None
    return [dict(zip(columns, turn, strict=True)) for turn in zip(*columns.values(), strict=True)]


def _message(turn: object, where: str) -> Message:
    keys = turn.keys() if isinstance(turn, Mapping) else set()
    who, what = next(((who, what) for who, what in TURN_KEYS if who in keys), ("", ""))
    if not isinstance(turn, Mapping) or not who:
        raise UsageError(
            f"{where} has no role", "a turn has `role` and `content`, or `from` and `value`; mend it or leave it out"
        )
    role = _NAMES.get(str(turn[who]).lower())
    if role is None:
        raise UsageError(
            f"{where}: no chat template knows the role '{turn[who]}'", f"use one of {', '.join(sorted(_NAMES))}"
        )
    beside = {name: value for name, value in turn.items() if name not in (who, what) and value is not None}
    return {**beside, "role": role, "content": _content(turn.get(what), where)}


def _content(value: object, where: str) -> str:
    """The text of a turn; a list of parts is joined where all of them are text, nothing (a tool call) is ''."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    parts = value if isinstance(value, list | tuple) else [None]
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    if any(not isinstance(text, str) for text in texts):
        raise UsageError(f"{where} holds more than text", "leave conversations with pictures or sound out")
    return "".join(str(text) for text in texts)
