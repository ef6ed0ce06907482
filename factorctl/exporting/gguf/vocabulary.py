"""The rows of a GGUF vocabulary, and the pieces of SentencePiece that fill them.

SentencePiece's BPE joins, of all neighbours that are a piece together, the pair whose piece has the highest score.
tokenizer.json has merges in their order instead. Converters wrote them from the scores, so the order of the merges
gives scores back that choose alike: a piece's rank among those that merges make, counted down from 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType

from factorctl.errors import UsageError
from factorctl.exporting.gguf.special import SpecialTokens

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_UNUSED_SCORE = -10000.0


@dataclass(frozen=True)
class Piece:
    """One piece of a SentencePiece vocabulary."""

    index: int
    text: str
    kind: TokenType
    score: float


class TokenTable:
    """Tokens, types and scores by id, filled one by one: as many as the embedding has rows."""

    def __init__(self, size: int) -> None:
        self.tokens: list[str | None] = [None] * size
        self.types = [int(TokenType.UNUSED)] * size
        self.scores = [_UNUSED_SCORE] * size

    def place(self, index: int, token: str, kind: TokenType) -> None:
        """Raises:
        UsageError: the embedding has no such row.
        """
        if not isinstance(token, str) or index < 0:
            raise UsageError(f"the tokenizer has the id {index} for {str(token)[:80]!r}", "its files are damaged")
        if index >= len(self.tokens):
            raise UsageError(
                f"the tokenizer has an id {index} ({token!r}), but the model embeds only {len(self.tokens)} tokens",
                "the tokenizer files belong to another model",
            )
        self.tokens[index], self.types[index] = token, int(kind)

    def place_all(self, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            self.place(piece.index, piece.text, piece.kind)
            self.scores[piece.index] = piece.score

    def place_added(self, special: SpecialTokens) -> None:
        """Tokens that are matched before a text is split; the unknown one keeps its type, by which it is known."""
        for text, index in special.added.items():
            is_unknown = 0 <= index < len(self.types) and self.types[index] == TokenType.UNKNOWN
            kind = TokenType.CONTROL if index in special.control else TokenType.USER_DEFINED
            self.place(index, text, TokenType.UNKNOWN if is_unknown else kind)

    def names(self) -> list[str]:
        """The tokens; rows that the tokenizer does not know get names of their own, since no two may be alike."""
        taken = set(self.tokens)
        found = []
        for index, token in enumerate(self.tokens):
            name = f"[PAD{index}]" if token is None else token
            while token is None and name in taken:
                name = f"[{name}]"
            found.append(name)
        return found


def pieces_of_model(path: Path) -> list[Piece]:
    """The pieces of a tokenizer.model.

    Raises:
        UsageError: the package sentencepiece is missing.
    """
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise UsageError(
            f"{path} is a SentencePiece model, and the package sentencepiece is not installed",
            "pip install sentencepiece",
        ) from None
    model = SentencePieceProcessor()
    model.LoadFromFile(str(path))
    return [
        Piece(index, model.IdToPiece(index), _kind(model, index), model.GetScore(index))
        for index in range(model.vocab_size())
    ]


def _kind(model: Any, index: int) -> TokenType:
    if model.IsUnknown(index):
        return TokenType.UNKNOWN
    if model.IsControl(index):
        return TokenType.CONTROL
    return TokenType.BYTE if model.IsByte(index) else TokenType.NORMAL


def pieces_of_merges(model: Mapping[str, Any]) -> list[Piece]:
    """The pieces of a tokenizer.json whose BPE falls back to bytes, with scores that order them as its merges do.

    Pieces that no merge makes, such as single characters, rank behind the others in the order of their ids.
    """
    vocab = model["vocab"]
    made = ["".join(merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in model["merges"]]
    ranked = dict.fromkeys(piece for piece in made if piece in vocab)
    ranked |= dict.fromkeys(sorted(vocab, key=vocab.__getitem__))
    pieces, rank = [], 0
    for text in ranked:
        kind = TokenType.BYTE if _BYTE.fullmatch(text) else TokenType.NORMAL
        if text == model.get("unk_token"):
            kind = TokenType.UNKNOWN
        pieces.append(Piece(vocab[text], text, kind, float(-rank) if kind is TokenType.NORMAL else 0.0))
        rank += kind is TokenType.NORMAL
    return pieces
