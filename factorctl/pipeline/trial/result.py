"""What a try gives back; the keys of `try --format json`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from factorctl.reporting.hardware import Hardware


@dataclass(frozen=True)
class Continuation:
    """What one model wrote, and how fast."""

    text: str
    """Without special tokens."""
    tokens: list[int]
    """An end of text included."""
    ended: bool
    """Whether the model ended its text; else the number of tokens did."""
    first_token_ms: float
    """From the prompt to the first token."""
    decode_ms: float
    """From the first token to the last."""

    @property
    def steps(self) -> int:
        """Tokens that `decode_ms` was spent on: all but the first."""
        return len(self.tokens) - 1


@dataclass(frozen=True)
class Difference:
    """The first token that differs."""

    token: int
    """Counted from 1."""
    dense: str | None
    """As text, special tokens included; None where that model wrote nothing more."""
    model: str | None


@dataclass(frozen=True)
class Answer:
    """One prompt and what both models made of it."""

    prompt: str
    prompt_tokens: int
    """Chat template and special tokens included."""
    dense: Continuation
    model: Continuation
    dense_tokens_per_second: float | None
    """While decoding; None where nothing but a first token was written."""
    model_tokens_per_second: float | None
    first_difference: Difference | None
    """None where both wrote the same."""
    alike: int
    """Of the dense model's tokens: for how many places the two hold the same token for the likeliest, each given the
    prompt and what the dense model wrote up to there."""
    alike_share: float


@dataclass(frozen=True)
class TryResult:
    """What was tried, and every prompt's answers."""

    checkpoint: str
    source: str
    notation: str | None
    runtime: dict[str, str]
    """What ran each of them, `dense` and `model`."""
    same_runtime: bool
    """Whether speeds may be compared: else they tell engines apart, not models."""
    chat: bool
    temperature: float
    top_p: float | None
    max_new_tokens: int
    seed: int
    answers: list[Answer]
    dense_tokens_per_second: float | None
    """Over all prompts."""
    model_tokens_per_second: float | None
    speed_up: float | None
    """Model over dense; None where runtimes differ."""
    alike_share: float | None
    """Of all the dense model's tokens; None where there was no prompt."""
    hardware: Hardware
    busy: bool
    versions: dict[str, str]
    config: dict[str, Any]
    remarks: list[str] = field(default_factory=list)
    written: list[str] = field(default_factory=list)
