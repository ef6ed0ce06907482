"""A chat template as turns: what stands before and after each message, found by rendering marked conversations.

A Jinja template is a program. Engines that do not run it, as Ollama, want the text around the messages instead. Where
rendering is nothing but such text, a few conversations with marked messages tell it; others are then rendered both
ways, and where the two differ there is no such format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Conversation = Sequence[Mapping[str, str]]

_SYSTEM, _USER, _ANSWER, _NEXT = "Qsystemq", "Quserq", "Qanswerq", "Qnextq"
_QUESTION = {"role": "user", "content": "What is the capital of France?"}
_REPLY = {"role": "assistant", "content": "It is Paris."}
_SHORT: Conversation = (_QUESTION, _REPLY, {"role": "user", "content": "And of Japan?"})
CONVERSATIONS: tuple[Conversation, ...] = (
    (_QUESTION,),
    _SHORT,
    ({"role": "system", "content": "You answer in one sentence."}, _QUESTION),
    ({"role": "system", "content": "Be kind."}, *_SHORT, {"role": "assistant", "content": "Tokyo."}, _QUESTION),
)
"""What a template is tried on."""


@dataclass(frozen=True)
class ChatFormat:
    """The text around the messages of a conversation. Contents are taken as they are: none is trimmed."""

    opening: str
    """Where no system message is given: the default one of the template, or nothing."""
    system: tuple[str, str] | None
    """Around the system message; None where the template takes none."""
    user: tuple[str, str]
    assistant: tuple[str, str]
    prompt: str
    """Behind the last message, where the answer is to begin."""
    joins_system: bool = False
    """Whether the system message stands inside of the first user turn, whose own beginning is then left out."""

    def render(self, conversation: Conversation) -> str:
        """The conversation with the prompt for the next answer."""
        has_system = conversation[0]["role"] == "system"
        text = "" if has_system else self.opening
        for place, message in enumerate(conversation):
            around = {"system": self.system or ("", ""), "user": self.user, "assistant": self.assistant}
            before, after = around[message["role"]]
            if message["role"] == "user" and has_system and self.joins_system and place == 1:
                before = ""
            text += before + message["content"] + after
        return text + self.prompt


def rendered(tokenizer: Any, conversation: Conversation, *, prompt: bool = True) -> str | None:
    """What the chat template makes of a conversation; None where it refuses it, as some refuse a system message."""
    try:
        text = tokenizer.apply_chat_template(list(conversation), tokenize=False, add_generation_prompt=prompt)
    except Exception:  # templates raise what they like
        return None
    return text if isinstance(text, str) else None


def end_of_turn(tokenizer: Any, special: Mapping[str, int]) -> int | None:
    """The special token that ends an answer in the chat template; None without a template, or without such a token."""
    answer = {"role": "assistant", "content": _ANSWER}
    text = rendered(tokenizer, ({"role": "user", "content": _USER}, answer), prompt=False)
    if text is None or text.count(_ANSWER) != 1:
        return None
    rest = text.partition(_ANSWER)[2].lstrip()
    ending = max((name for name in special if name and rest.startswith(name)), key=len, default=None)
    return None if ending is None else special[ending]


def chat_format(tokenizer: Any) -> ChatFormat | None:
    """The format of a tokenizer's chat template; None where it is more than text around messages or writes the date."""
    if "strftime_now" in str(getattr(tokenizer, "chat_template", "")):
        return None
    found = _read_off(tokenizer)
    if found is None:
        return None
    for conversation in CONVERSATIONS:
        text = rendered(tokenizer, conversation)
        if text is None and conversation[0]["role"] == "system" and found.system is None:
            continue
        if text != found.render(conversation):
            return None
    return found


def _read_off(tokenizer: Any) -> ChatFormat | None:
    user, answer = {"role": "user", "content": _USER}, {"role": "assistant", "content": _ANSWER}
    turns = (user, answer, {"role": "user", "content": _NEXT})
    long = _split(rendered(tokenizer, turns), _USER, _ANSWER, _NEXT)
    asked = _split(rendered(tokenizer, (user,), prompt=False), _USER)
    answered = _split(rendered(tokenizer, (user, answer), prompt=False), _USER, _ANSWER)
    if long is None or asked is None or answered is None:
        return None
    head, question_to_answer, answer_to_question, tail = long
    user_end, answer_end = asked[1], answered[2]
    nested = (
        question_to_answer.startswith(user_end)
        and tail.startswith(user_end)
        and answer_to_question.startswith(answer_end)
    )
    user_begin = answer_to_question[len(answer_end) :]
    if not nested or not head.endswith(user_begin):
        return None
    found = ChatFormat(
        opening=head.removesuffix(user_begin),
        system=None,
        user=(user_begin, user_end),
        assistant=(question_to_answer[len(user_end) :], answer_end),
        prompt=tail[len(user_end) :],
    )
    return _with_system(
        found, _split(rendered(tokenizer, ({"role": "system", "content": _SYSTEM}, user)), _SYSTEM, _USER)
    )


def _with_system(found: ChatFormat, parts: list[str] | None) -> ChatFormat:
    if parts is None:
        return found
    before, between, _ = parts
    begin = found.user[0]
    joins = not between.endswith(begin)
    return ChatFormat(
        found.opening,
        (before, between if joins else between.removesuffix(begin)),
        found.user,
        found.assistant,
        found.prompt,
        joins,
    )


def _split(text: str | None, *marks: str) -> list[str] | None:
    """The text around the marks; None where one is not there exactly once, in order."""
    if text is None or any(text.count(mark) != 1 for mark in marks):
        return None
    parts = []
    for mark in marks:
        part, found, text = text.partition(mark)
        if not found:
            return None
        parts.append(part)
    return [*parts, text]
