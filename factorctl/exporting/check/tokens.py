"""Whether llama.cpp makes the same tokens of a text as the model's own tokenizer, special ones included.

Plain prose holds no special token. So each of them is asked for by its text, and the chat template is rendered and
split by both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from factorctl.errors import IntegrityError
from factorctl.exporting.check.llama_cpp import LlamaAnswer
from factorctl.exporting.check.text import PASSAGES
from factorctl.exporting.gguf.chat_format import CONVERSATIONS, rendered
from factorctl.exporting.gguf.special import ELSEWHERE
from factorctl.exporting.gguf.tokenizer import GgufTokenizer

_HINT = f"nothing was published; {ELSEWHERE}"
HARD_TEXT = (
    "Zażółć gęślą jaźń; naïve café, Ünïcödé.\tTabs\tand   runs  of spaces,\n\n\nempty lines,\n    four of them.",
    "Привет, мир! 你好，世界。 こんにちは 안녕하세요 مرحبا 🙂👩‍👩‍👧‍👦 x² ≤ √2 – “quoted”",
    "'it's' I'LL we've 1234567 3.14e-10",
    "class A:\n\tdef f(self, x):\n\t\treturn {**x, 'k': [1,2,3]}  # --> done!!\r\n<tag attr=\"v\">&amp;</tag>",
)
"""Where tokenizers differ first: scripts, combined characters, white space, digits, code."""


@dataclass(frozen=True)
class TokenQuestions:
    """What both tokenizers are asked."""

    texts: tuple[str, ...]
    special: Mapping[str, int]
    """Special tokens that the model's own tokenizer finds in their text alone."""
    chats: tuple[str, ...]
    skipped: int
    """Texts that the vocabulary cannot spell, since it lacks a byte of theirs: what is left out of them may differ."""

    @property
    def fragments(self) -> list[str]:
        """What is asked for without BOS and EOS."""
        return [*self.special, *self.chats]


def token_questions(tokenizer: GgufTokenizer) -> TokenQuestions:
    """The passages, every special token, and conversations as the chat template renders them."""
    own = tokenizer.original
    found = {text: index for text, index in tokenizer.special.added.items() if _ids(own, text) == [index]}
    chats = [text for conversation in CONVERSATIONS if (text := rendered(own, conversation))]
    texts, missing = (*PASSAGES, *HARD_TEXT), tokenizer.missing_bytes
    spelled = [tuple(text for text in asked if missing.isdisjoint(text.encode())) for asked in (texts, chats)]
    return TokenQuestions(spelled[0], found, spelled[1], skipped=len(texts) - len(spelled[0]))


def check_tokens(tokenizer: GgufTokenizer, questions: TokenQuestions, answer: LlamaAnswer) -> list[str]:
    """Compare llama.cpp's tokens with the model's own.

    Returns:
        Notes: what differs in whole conversations beside their special tokens, which is white space behind one, and
        what could not be compared.

    Raises:
        IntegrityError: a text, a special token or an end of text that is another one in llama.cpp.
    """
    own = tokenizer.original
    for text, theirs in zip(questions.texts, answer.tokens, strict=True):
        _require_equal("tokenises", text, _ids(own, text, whole=True), theirs)
    for (text, index), theirs in zip(questions.special.items(), answer.fragments, strict=False):
        _require_equal("reads the special token", text, [index], theirs)
    for token, does_end in zip(tokenizer.special.ends, answer.ending, strict=True):
        if not does_end:
            raise IntegrityError(
                f"llama.cpp goes on behind token {token} ({tokenizer.tokens[token]!r}), which ends a text "
                "as the model's files say",
                _HINT,
            )
    notes = _compare_chats(own, questions, answer.fragments[len(questions.special) :])
    if questions.skipped:
        notes.append(
            f"{questions.skipped} of {questions.skipped + len(questions.texts)} texts are not tokenised in llama.cpp: "
            "the vocabulary has no token for some of their bytes"
        )
    return notes


def _compare_chats(own: Any, questions: TokenQuestions, chats: Sequence[Sequence[int]]) -> list[str]:
    added, notes = set(questions.special.values()), []
    for text, theirs in zip(questions.chats, chats, strict=True):
        ours = _ids(own, text)
        kept, their_kept = ([token for token in ids if token in added] for ids in (ours, theirs))
        if kept != their_kept:
            _require_equal("finds other special tokens in the conversation", text, kept, their_kept)
        if ours != list(theirs):
            notes.append(
                f"behind special tokens llama.cpp splits white space otherwise than the model's own tokenizer: a "
                f"conversation of {len(ours)} tokens has {len(theirs)} there"
            )
    return notes[:1]


def _require_equal(does: str, text: str, ours: Sequence[int], theirs: Sequence[int]) -> None:
    if list(ours) == list(theirs):
        return
    place = next((at for at, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), 0)
    first = max(0, place - 2)
    raise IntegrityError(
        f"llama.cpp {does} {text[:40]!r} as {list(theirs)[first : first + 6]} from token {first} on; the model's own "
        f"tokenizer gives {list(ours)[first : first + 6]}",
        _HINT,
    )


def _ids(own: Any, text: str, *, whole: bool = False) -> list[int]:
    return [int(token) for token in own(text, add_special_tokens=whole)["input_ids"]]
