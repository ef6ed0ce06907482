"""A Modelfile for Ollama: where the weights are, and the chat template as Ollama writes one.

Ollama does not run a file's Jinja template. It looks for the one in its own list that is nearest in spelling, and where
none is near it sends the bare prompt. So the template is written out in Ollama's language, that of Go's text/template,
wherever it is text around messages; a near relative is then never taken for it either.
Source: ollama `template/template.go`, `server/images.go`.
"""

from __future__ import annotations

from collections.abc import Iterable

from factorctl.exporting.gguf.chat_format import ChatFormat
from factorctl.exporting.gguf.tokenizer import GgufTokenizer

_HEAD = """# ollama create NAME -f Modelfile
FROM ./model.gguf
"""
_NO_FORMAT = """
# The chat template in model.gguf is more than text around messages, or writes the date: no TEMPLATE says the same.
# Ollama takes the nearest of its own, if one is near.
"""


def modelfile(tokenizer: GgufTokenizer) -> str:
    """The Modelfile of a GGUF file with this tokenizer."""
    if tokenizer.special.chat_template is None:
        return _HEAD
    if tokenizer.chat is None or _cannot_stand(tokenizer.chat):
        return _HEAD + _NO_FORMAT
    bos = tokenizer.tokens[tokenizer.special.ids["bos"]] if tokenizer.special.adds_bos else ""
    stops = "".join(f'PARAMETER stop "{stop}"\n' for stop in stop_texts(tokenizer))
    return f'{_HEAD}\nTEMPLATE """{go_template(tokenizer.chat, bos)}"""\n\n{stops}'


def go_template(chat: ChatFormat, bos: str) -> str:
    """The format in Go's text/template, over Ollama's `.Messages` and `.System`.

    An answer that comes last is to be continued: nothing follows it.

    Args:
        bos: what llama.cpp puts in front by itself, so that the template must not.
    """
    before, after = chat.system or ("", "")
    opening, user = chat.opening.removeprefix(bos), chat.user[0]
    if bos and not chat.opening and user.startswith(bos):
        user = "{{ if $i }}" + bos + "{{ end }}" + user.removeprefix(bos)
    if chat.system is not None and chat.joins_system:
        user = "{{ if not (and $.System (eq $i 1)) }}" + user + "{{ end }}"
    branches = [
        '{{ if eq $m.Role "user" }}' + user + "{{ $m.Content }}" + chat.user[1],
        '{{ else if eq $m.Role "assistant" }}' + chat.assistant[0] + "{{ $m.Content }}",
        "{{ if not $last }}" + chat.assistant[1] + "{{ end }}",
    ]
    if chat.system is not None:
        branches.append('{{ else if eq $m.Role "system" }}' + before.removeprefix(bos) + "{{ $m.Content }}" + after)
    return "".join(
        [
            "{{ if not .System }}" + opening + "{{ end }}" if opening else "",
            "{{ range $i, $m := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}",
            *branches,
            "{{ end }}",
            '{{ if and $last (ne $m.Role "assistant") }}' + chat.prompt + "{{ end }}",
            "{{ end }}",
        ]
    )


def stop_texts(tokenizer: GgufTokenizer) -> list[str]:
    """What shows that the model goes on past its answer: the end of its turn, and the beginning of another."""
    chat, added = tokenizer.chat, tokenizer.special.added
    assert chat is not None
    ends = [tokenizer.tokens[token] for token in tokenizer.special.ends]
    begins = [_first_special(text, added) or _first_line(text) for text in (chat.user[0], (chat.system or ("",))[0])]
    return [text for text in dict.fromkeys([*ends, *begins]) if text and '"' not in text]


def _first_special(text: str, special: Iterable[str]) -> str | None:
    """The special token that comes first in the text, the longest where several do."""
    found = [(text.index(name), -len(name), name) for name in special if name and name in text]
    return min(found)[2] if found else None


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def _cannot_stand(chat: ChatFormat) -> bool:
    """Whether a text holds what ends a TEMPLATE or begins an action."""
    texts = [chat.opening, *(chat.system or ()), *chat.user, *chat.assistant, chat.prompt]
    return any(mark in text for text in texts for mark in ('"""', "{{", "}}"))
