"""Parts of `try` that need no weights: what may be asked, prompts, and how two continuations are held together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from support.tiny import make_tokenizer

from factorctl.config.trial import TryConfig
from factorctl.errors import IntegrityError, UsageError
from factorctl.pipeline.trial.comparison import count_alike, described, first_difference
from factorctl.pipeline.trial.engines import OnText, Sampling
from factorctl.pipeline.trial.prompts import prepare, read_prompts, takes_chat
from factorctl.pipeline.trial.result import Continuation, Difference

CHATML = (
    "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)


def written(*tokens: int) -> Continuation:
    return Continuation("", list(tokens), ended=False, first_token_ms=1.0, decode_ms=1.0)


class Scripted:
    """An engine that holds the sum of all ids before a place, modulo 7, for the likeliest there."""

    name = "scripted"

    def __init__(self) -> None:
        self.asked: list[int] = []

    def continuation(self, prompt: Sequence[int], sampling: Sampling, on_text: OnText) -> Continuation:
        tokens: list[int] = []
        for _ in range(sampling.max_new_tokens):
            tokens.append(sum([*prompt, *tokens]) % 7)
        return written(*tokens)

    def choices(self, prompt: Sequence[int], continuation: Sequence[int]) -> list[int]:
        self.asked.append(len(continuation))
        return [sum([*prompt, *continuation[:place]]) % 7 for place in range(len(continuation))]

    def close(self) -> None: ...


# what may be asked


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens 0 is no positive number", "try 64"),
        ({"temperature": -1.0}, "--temperature -1 is out of range", "choose 0"),
        ({"temperature": float("nan")}, "--temperature nan is out of range", "choose 0"),
        ({"top_p": 0.0}, "--top-p 0 is out of range", "like 0.9"),
        ({"top_p": 1.5}, "--top-p 1.5 is out of range", "like 0.9"),
        ({"top_p": 0.9, "temperature": 0.0}, "--top-p 0.9 chooses nothing at --temperature 0", "leave out one"),
        ({"chat": True, "raw": True}, "--chat and --raw were both given", "leave one of them out"),
        ({"prompt": "a", "prompts": Path("b")}, "PROMPT and --prompts were both given", "leave one of them out"),
    ],
)
def test_what_cannot_be_asked_says_so(options: dict[str, object], message: str, hint: str) -> None:
    with pytest.raises(UsageError) as raised:
        TryConfig(**options)  # type: ignore[arg-type]
    assert message in raised.value.message
    assert raised.value.hint is not None
    assert hint in raised.value.hint


@pytest.mark.parametrize(
    ("options", "temperature"),
    [({}, 0.0), ({"temperature": 0.7}, 0.7), ({"top_p": 0.9}, 1.0), ({"top_p": 0.9, "temperature": 0.5}, 0.5)],
)
def test_greedy_unless_something_is_to_be_drawn(options: dict[str, float], temperature: float) -> None:
    assert TryConfig(**options).sampled_at == temperature  # type: ignore[arg-type]


# prompts


def test_a_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one thing\r\n\n   \nand\u2028another\n", encoding="utf-8")
    assert read_prompts(tmp_path / "prompts.txt") == ["one thing", "and\u2028another"]


def test_json_lines_hold_prompts_of_several_lines(tmp_path: Path) -> None:
    (tmp_path / "my.prompts.jsonl").write_text('{"prompt": "one\\ntwo"}\n\n{"prompt": "three", "id": 7}\n')
    assert read_prompts(tmp_path / "my.prompts.jsonl") == ["one\ntwo", "three"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "holds no prompt"),
        ("blank.txt", b"\n  \n", "holds no prompt"),
        ("empty.jsonl", b"", "holds no prompt"),
        ("other.jsonl", b'{"text": "a"}\n', "line 1 has no field `prompt`"),
        ("number.jsonl", b'{"prompt": "a"}\n{"prompt": 3}\n', "line 2 has a field `prompt` that holds no text"),
        ("latin.txt", b"caf\xe9", "is not UTF-8 text (byte 4)"),
    ],
)
def test_a_file_without_prompts_says_how_to_write_them(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises((UsageError, IntegrityError)) as raised:
        read_prompts(tmp_path / name)
    assert message in raised.value.message
    assert '{"prompt": "The capital of France is"}' in str(raised.value.hint)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.txt is no file"):
        read_prompts(tmp_path / "nowhere.txt")


def test_the_chat_template_is_used_where_there_is_one_unless_raw_is_asked_for() -> None:
    tokenizer = make_tokenizer()
    plain = prepare("abc", tokenizer, chat=takes_chat(tokenizer, None, Path("m")), context=64, max_new_tokens=8)
    assert tokenizer.decode(plain.ids) == "abc"
    tokenizer.chat_template = CHATML
    asked = prepare("abc", tokenizer, chat=takes_chat(tokenizer, None, Path("m")), context=64, max_new_tokens=8)
    assert tokenizer.decode(asked.ids) == "<s>user abc</s><s>assistant "
    raw = prepare("abc", tokenizer, chat=takes_chat(tokenizer, False, Path("m")), context=64, max_new_tokens=8)
    assert raw.ids == plain.ids


def test_chat_without_a_template_is_refused() -> None:
    with pytest.raises(UsageError) as raised:
        takes_chat(make_tokenizer(), True, Path("runs/x"))
    assert raised.value.message == "the tokenizer in runs/x has no chat template"
    assert "leave out --chat" in str(raised.value.hint)


def test_a_template_that_refuses_is_quoted() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('only for system messages') }}"
    with pytest.raises(UsageError) as raised:
        prepare("abc", tokenizer, chat=True, context=64, max_new_tokens=8)
    assert "only for system messages" in raised.value.message
    assert raised.value.hint == "give the prompt as it is: --raw"


def test_a_prompt_beyond_the_context_says_what_would_fit() -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(UsageError) as raised:
        prepare("a" * 64, tokenizer, chat=False, context=64, max_new_tokens=8)
    assert "is 64 tokens long; the models know 64 positions" in raised.value.message
    assert raised.value.hint == "shorten it to 63 tokens or fewer"
    with pytest.raises(UsageError) as raised:
        prepare("a" * 60, tokenizer, chat=False, context=64, max_new_tokens=8)
    assert "with --max-new-tokens 8 it passes the 64 positions" in raised.value.message
    assert raised.value.hint == "choose --max-new-tokens 4 or fewer, or shorten the prompt"
    assert len(prepare("a" * 56, tokenizer, chat=False, context=64, max_new_tokens=8).ids) == 56
    assert len(prepare("a" * 99, tokenizer, chat=False, context=None, max_new_tokens=8).ids) == 99


# two continuations


@pytest.mark.parametrize(
    ("dense", "model", "place"),
    [([1, 2, 3], [1, 2, 3], None), ([1, 2, 3], [1, 5, 3], 1), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1], 1)],
)
def test_the_first_difference(dense: list[int], model: list[int], place: int | None) -> None:
    assert first_difference(dense, model) == place


def test_a_difference_is_told_as_text() -> None:
    tokenizer = make_tokenizer()
    a, b, end = (tokenizer.get_vocab()[token] for token in ("a", "b", "</s>"))
    assert described(1, written(a, b), written(a, end), tokenizer) == Difference(2, "b", "</s>")
    assert described(1, written(a, b), written(a), tokenizer) == Difference(2, "b", None)
    assert described(None, written(a), written(a), tokenizer) is None


@pytest.mark.parametrize("dense", [[3, 6, 5, 3, 1, 4, 2, 4], [2, 6, 5], [3, 6, 5, 3, 6, 5, 3], [0]])
def test_alike_is_what_asking_for_every_place_gives(dense: list[int]) -> None:
    """The dumb way: both are given the prompt and the dense text up to each place."""
    engine, prompt = Scripted(), [1, 2]
    model = engine.continuation(prompt, Sampling(len(dense)), lambda piece: None)
    expected = sum(sum([*prompt, *dense[:place]]) % 7 == token for place, token in enumerate(dense))
    alike = count_alike(prompt, written(*dense), model, engines=(Scripted(), engine), greedy=True)
    assert alike == expected
    assert all(asked < len(dense) for asked in engine.asked), "what was written is not asked for again"


def test_the_same_text_needs_no_question() -> None:
    engine = Scripted()
    text = engine.continuation([1], Sampling(5), lambda piece: None)
    assert count_alike([1], text, text, engines=(engine, engine), greedy=True) == 5
    assert engine.asked == []


def test_drawn_text_is_held_against_the_likeliest_tokens_of_both() -> None:
    dense, model = Scripted(), Scripted()
    assert count_alike([1], written(5, 5, 5), written(4, 4, 4), engines=(dense, model), greedy=False) == 3
    assert dense.asked == model.asked == [3]
