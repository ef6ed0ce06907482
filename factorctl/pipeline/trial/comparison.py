"""Two continuations of one prompt held against one another."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from factorctl.pipeline.trial.engines import Engine
from factorctl.pipeline.trial.result import Continuation, Difference


def first_difference(dense: Sequence[int], model: Sequence[int]) -> int | None:
    """Place, from 0, of the first token that the two do not share; None where they are the same."""
    for place, (theirs, ours) in enumerate(zip(dense, model, strict=False)):
        if theirs != ours:
            return place
    return None if len(dense) == len(model) else min(len(dense), len(model))


def described(
    place: int | None, dense: Continuation, model: Continuation, tokenizer: PreTrainedTokenizerBase
) -> Difference | None:
    """The same for a reader, as text."""
    if place is None:
        return None

    def text(tokens: Sequence[int]) -> str | None:
        return str(tokenizer.decode([tokens[place]])) if place < len(tokens) else None

    return Difference(place + 1, text(dense.tokens), text(model.tokens))


def count_alike(
    prompt: Sequence[int], dense: Continuation, model: Continuation, *, engines: tuple[Engine, Engine], greedy: bool
) -> int:
    """For how many places of the dense continuation both models hold the same token for the likeliest.

    Each is given the prompt and what the dense model wrote before that place, so one early difference does not make
    all that follows it different. What is known is not computed again: taking the likeliest token, the dense model
    chose what it wrote, and so did the other up to the first difference.

    Args:
        engines: dense, model.
        greedy: whether the continuations took the likeliest token at each place.
    """
    written = dense.tokens
    if not greedy:
        theirs, ours = (engine.choices(prompt, written) for engine in engines)
        return _matches(theirs, ours)
    place = first_difference(written, model.tokens)
    if place is None:
        return len(written)
    known = min(place + 1, len(model.tokens))
    rest = written[known:]
    return place + (_matches(rest, engines[1].choices([*prompt, *written[:known]], rest)) if rest else 0)


def _matches(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(mine == theirs for mine, theirs in zip(one, other, strict=True))
