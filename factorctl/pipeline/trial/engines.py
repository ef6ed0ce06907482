"""What continues a prompt: one interface over transformers and llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from factorctl.pipeline.trial.result import Continuation

OnText = Callable[[str], None]
"""Called with each further piece of text."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is taken."""

    max_new_tokens: int
    temperature: float = 0.0
    """0: the likeliest token."""
    top_p: float | None = None
    seed: int = 0
    """Of the draws, for every continuation anew: a prompt's continuation does not hang on the prompts before it."""

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


class Engine(Protocol):
    """A model in memory, ready to write."""

    name: str
    """What runs it, for the reader."""

    def continuation(self, prompt: Sequence[int], sampling: Sampling, on_text: OnText) -> Continuation:
        """Continue token ids with a KV cache, one token after the other."""
        ...

    def choices(self, prompt: Sequence[int], continuation: Sequence[int]) -> list[int]:
        """The likeliest token at each place of `continuation`, given the prompt and what stands before that place."""
        ...

    def close(self) -> None: ...
