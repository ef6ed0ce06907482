"""What `try` draws on a terminal."""

from __future__ import annotations

import pytest

from factorctl.cli.render import SideBySide
from factorctl.cli.trial import Columns, comparison_of, speed_of
from factorctl.pipeline.trial.result import Answer, Continuation, Difference

DENSE = Continuation("a cat", [5, 6, 7], ended=True, first_token_ms=120.4, decode_ms=100.0)
MODEL = Continuation("a [b]dog[/b]", [5], ended=False, first_token_ms=80.0, decode_ms=0.0)


def answer(difference: Difference | None, alike: int = 2) -> Answer:
    return Answer("what?", 4, DENSE, MODEL, 20.0, None, difference, alike, alike / 3)


def test_a_speed_is_told_where_there_was_one() -> None:
    assert speed_of(DENSE) == "3 tokens, 20.0 tokens/s, first after 120 ms"
    assert speed_of(MODEL) == "1 token, first after 80 ms, cut off"


def test_where_two_texts_part_is_told_in_words() -> None:
    assert comparison_of(answer(Difference(2, " cat", None))) == [
        "first token that differs: 2, ' cat' dense, nothing here",
        "chosen alike: 2 of 3 tokens of the dense text (67%)",
    ]
    assert comparison_of(answer(None, alike=3))[0] == "no token differs"


def test_both_texts_stand_side_by_side(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    columns = Columns(SideBySide())
    columns.begin("what?", {"dense": "the dense one", "model": "the other"})
    for side, piece in (("dense", "a "), ("dense", "cat"), ("model", "a [b]dog[/b]")):
        columns.text(side, piece)  # type: ignore[arg-type]
    columns.written("dense", DENSE)
    columns.written("model", MODEL)
    columns.answered(answer(None))
    columns.end()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "> what?"
    for together in (("the dense one", "the other"), ("a cat", "a [b]dog[/b]"), ("3 tokens", "1 token")):
        assert any(all(words in line for words in together) for line in lines), together
    assert any(line.endswith("no token differs") for line in lines)


def test_what_ends_before_a_prompt_has_nothing_to_put_back() -> None:
    Columns(SideBySide()).end()
