"""What an export and the native model are both asked: short passages in the public domain, or random ids.

Prose, verse, dialogue, another language, numbers and code, so that many tokens and experts come up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

SEQUENCE_TOKENS = 64
RANDOM_SEQUENCES = 8

PASSAGES = (
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: "
    "once or twice she had peeped into the book her sister was reading, but it had no pictures or "
    "conversations in it, 'and what is the use of a book,' thought Alice 'without pictures or conversations?' "
    "So she was considering in her own mind (as well as she could, for the hot day made her feel very sleepy "
    "and stupid), whether the pleasure of making a daisy-chain would be worth the trouble of getting up and "
    "picking the daisies.",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in "
    "want of a wife. However little known the feelings or views of such a man may be on his first entering a "
    "neighbourhood, this truth is so well fixed in the minds of the surrounding families, that he is "
    "considered as the rightful property of some one or other of their daughters.",
    "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in "
    "Liberty, and dedicated to the proposition that all men are created equal. Now we are engaged in a great "
    "civil war, testing whether that nation, or any nation so conceived and so dedicated, can long endure. We "
    "are met on a great battle-field of that war.",
    "Shall I compare thee to a summer's day?\nThou art more lovely and more temperate:\nRough winds do shake "
    "the darling buds of May,\nAnd summer's lease hath all too short a date;\nSometime too hot the eye of "
    "heaven shines,\nAnd often is his gold complexion dimm'd;\nAnd every fair from fair sometime declines,\nBy "
    "chance or nature's changing course untrimm'd;",
    "When, in the course of the year 1859, the theory was first published, few naturalists had considered that "
    "light takes 8 minutes and 19 seconds to travel 149,597,871 km from the Sun, or that 2 + 2 = 4 and 7 * 8 = "
    "56 are found, not made. The boiling point of water is 100 degrees Celsius, which is 212 degrees "
    "Fahrenheit, at a pressure of 101,325 pascals.",
    "def greatest_common_divisor(a: int, b: int) -> int:\n    while b:\n        a, b = b, a % b\n    return "
    "abs(a)\n\n\nfor first, second in [(12, 18), (35, 64), (1071, 462)]:\n    result = "
    'greatest_common_divisor(first, second)\n    print(f"gcd({first}, {second}) = {result}")\n',
    "Habe nun, ach! Philosophie, Juristerei und Medizin, und leider auch Theologie durchaus studiert, mit "
    "heissem Bemuehn. Da steh ich nun, ich armer Tor! Und bin so klug als wie zuvor; heisse Magister, heisse "
    "Doktor gar und ziehe schon an die zehen Jahr herauf, herab und quer und krumm meine Schueler an der Nase "
    "herum.",
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse, "
    "and nothing particular to interest me on shore, I thought I would sail about a little and see the watery "
    "part of the world. It is a way I have of driving off the spleen and regulating the circulation.",
)


def text_sequences(tokenise: Callable[[str], list[int]], *, vocab_size: int, context: int) -> list[list[int]]:
    """The passages as token ids, each cut to `SEQUENCE_TOKENS` and to the model's context."""
    length = min(SEQUENCE_TOKENS, context)
    encoded = [tokenise(passage)[:length] for passage in PASSAGES]
    return [ids for ids in encoded if ids and max(ids) < vocab_size]


def random_sequences(*, vocab_size: int, context: int, seed: int) -> list[list[int]]:
    """Seeded random ids, for checkpoints without a tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    length = min(SEQUENCE_TOKENS, context)
    ids = torch.randint(vocab_size, (RANDOM_SEQUENCES, length), generator=generator)
    return [[int(token) for token in row] for row in ids]


def spread_positions(sequences: Sequence[Sequence[int]], context: int) -> list[range]:
    """Every second sequence from the beginning to the end of the context; the others without gaps."""
    steps = [max(1, (context - 1) // max(1, len(ids) - 1)) if index % 2 else 1 for index, ids in enumerate(sequences)]
    return [range(0, step * len(ids), step) for ids, step in zip(sequences, steps, strict=True)]
