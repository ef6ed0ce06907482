"""Chat templates as text around messages, and the Modelfile that says them in Ollama's language."""

from __future__ import annotations

import re
from typing import Any

import pytest
from support.exporting import byte_tokenizer

from factorctl.exporting.gguf.chat_format import CONVERSATIONS, ChatFormat, chat_format, end_of_turn, rendered
from factorctl.exporting.gguf.modelfile import go_template

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    + CHATML
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}<s>[INST] {{ system if loop.first else '' }}{{ m['content'] }} "
    "[/INST]{% else %} {{ m['content'] }} </s>{% endif %}{% endfor %}"
)
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}<s>"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
ALPACA = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}\n\n{% elif m['role'] == 'user' %}"
    "### Instruction:\n{{ m['content'] }}\n\n{% else %}### Response:\n{{ m['content'] }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)
FORMATS = {
    "chatml": CHATML,
    "default system": DEFAULT_SYSTEM,
    "llama2": LLAMA2,
    "gemma": GEMMA,
    "alpaca": ALPACA,
}
NO_FORMATS = {
    "numbered": "{% for m in messages %}{{ loop.index }}. {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
    "shouting": "{% for m in messages %}<s>{{ m['role'] }}{{ m['content'] | upper }}</s>{% endfor %}",
    "dated": "{{ strftime_now('%d %b %Y') }}" + CHATML,
    "counting": CHATML + "{{ messages | length }}",
    "broken": "{% for m in messages %}{{ m['nothing']['more'] }}{% endfor %}",
}


def tokenizer(template: str) -> Any:
    made = byte_tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<end_of_turn>"]})
    made.chat_template = template
    return made


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_renders_what_the_template_renders(name: str) -> None:
    asked = tokenizer(FORMATS[name])
    found = chat_format(asked)
    assert found is not None
    for conversation in CONVERSATIONS:
        expected = rendered(asked, conversation)
        if expected is None:
            assert name == "gemma"
            assert found.system is None
            continue
        assert found.render(conversation) == expected


@pytest.mark.parametrize("name", NO_FORMATS)
def test_a_template_that_is_more_than_text_around_messages_has_no_format(name: str) -> None:
    assert chat_format(tokenizer(NO_FORMATS[name])) is None


def test_what_ends_a_turn_is_found_in_the_template() -> None:
    for name, end in (("chatml", "<|im_end|>"), ("llama2", "</s>"), ("gemma", "<end_of_turn>"), ("alpaca", None)):
        asked = tokenizer(FORMATS[name])
        special = {str(token): index for index, token in asked.added_tokens_decoder.items()}
        assert end_of_turn(asked, special) == (None if end is None else special[end])


@pytest.mark.parametrize("bos", ["", "<s>"])
@pytest.mark.parametrize("name", FORMATS)
def test_ollamas_template_renders_the_same(name: str, bos: str) -> None:
    asked = tokenizer(FORMATS[name])
    found = chat_format(asked)
    assert found is not None
    for conversation in CONVERSATIONS:
        expected = rendered(asked, conversation)
        if expected is not None:
            assert run_go(go_template(found, bos), conversation) == expected.removeprefix(bos)


def test_an_answer_that_comes_last_is_to_be_continued() -> None:
    found = ChatFormat("", None, ("<u>", "</u>"), ("<a>", "</a>"), "<a>")
    conversation = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hel"}]
    assert run_go(go_template(found, ""), conversation) == "<u>Hi</u><a>Hel"


def run_go(template: str, conversation: Any) -> str:
    """What Go's text/template makes of the constructs that are used here: a plain reading of its documentation."""
    parts = re.split(r"(\{\{.*?\}\})", template)
    system = "\n\n".join(message["content"] for message in conversation if message["role"] == "system")
    out: list[str] = []

    def holds(condition: str, place: int) -> bool:
        last, role = place == len(conversation) - 1, conversation[place]["role"] if conversation else ""
        known = {
            "not .System": not system,
            "not $last": not last,
            "$i": place > 0,
            'and $last (ne $m.Role "assistant")': last and role != "assistant",
            "not (and $.System (eq $i 1))": not (system and place == 1),
            **{f'eq $m.Role "{name}"': role == name for name in ("user", "assistant", "system")},
        }
        return bool(known[condition])

    def block(at: int, place: int, shown: bool) -> int:
        """Run from `at` to the `end` or `else` that closes the block; return its index."""
        while at < len(parts):
            part = parts[at]
            action = part[2:-2].strip() if part.startswith("{{") else None
            if action is None:
                out.append(part if shown else "")
            elif action == "end" or action.startswith("else"):
                return at
            elif action == "range $i, $m := .Messages":
                end = at
                for number in range(len(conversation)):
                    end = block(at + 1, number, shown)
                at = end
            elif action.startswith("if "):
                at = chain(at, place, shown)
            elif action == "$m.Content":
                out.append(conversation[place]["content"] if shown else "")
            else:
                assert action == "$last := eq (len (slice $.Messages $i)) 1", action
            at += 1
        return at

    def chain(at: int, place: int, shown: bool) -> int:
        taken = False
        while parts[at] != "{{ end }}":
            condition = parts[at][2:-2].strip().removeprefix("else ").removeprefix("if ")
            now = shown and not taken and holds(condition, place)
            taken = taken or now
            at = block(at + 1, place, now)
        return at

    block(0, 0, True)
    return "".join(out)
