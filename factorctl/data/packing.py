"""Which documents are held out, and how documents fill blocks.

Packing: documents follow one another without padding, each as the tokenizer encodes it (with BOS where it adds one)
and with EOS behind it where the tokenizer has one (text of `self` as it was drawn). A document may run over several
blocks.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from factorctl.data.block_files import BlockWriter
from factorctl.data.blocks import Side
from factorctl.data.documents import Document
from factorctl.errors import UsageError
from factorctl.progress import Task


@dataclass(frozen=True)
class BlockPlan:
    """The sizes and choices that decide what the blocks hold."""

    block_length: int
    tokens: int
    seed: int
    heldout_fraction: float
    max_document_tokens: int | None

    def __post_init__(self) -> None:
        if self.block_length < 2 or self.tokens < 1:
            raise UsageError(
                f"{self.tokens} tokens in blocks of {self.block_length} cannot be built",
                "ask for at least 1 token, in blocks of at least 2",
            )
        if not 0 <= self.heldout_fraction < 1:
            raise UsageError(
                f"a held-out fraction of {self.heldout_fraction:g} is out of range", "choose 0 up to, not including, 1"
            )
        if self.max_document_tokens is not None and self.max_document_tokens < 1:
            raise UsageError(f"documents cannot be cut to {self.max_document_tokens} tokens", "choose 1 or more")

    @property
    def train_tokens(self) -> int:
        """The tokens asked for, filled up to whole blocks."""
        return math.ceil(self.tokens / self.block_length) * self.block_length

    @property
    def heldout_tokens(self) -> int:
        """Tokens to hold out beside the training tokens, in whole blocks: at least one unless the fraction is 0."""
        return math.ceil(self.heldout_fraction * self.train_tokens / self.block_length) * self.block_length

    def target(self, side: Side) -> int:
        return self.train_tokens if side == "train" else self.heldout_tokens


@dataclass
class Filling:
    """How far the two sides are, and which documents went where.

    A document is held out when its source has given less than its share to the held-out side; the first block of
    the held-out side is filled before anything else, so that even a short text keeps one. A text seen before stays
    on its side: copies never make the held-out side easier.
    """

    plan: BlockPlan
    num_sources: int
    used: Counter[tuple[str, Side]] = field(default_factory=Counter)
    """Tokens written per source and side."""
    documents: Counter[str] = field(default_factory=Counter)
    """Documents written per source."""
    available_tokens: int = 0
    """Tokens of all documents read so far, written or not."""
    seen_documents: int = 0
    """Documents read so far, written or not."""
    lengths: list[int] = field(default_factory=list)
    """Tokens of each document that the plan cuts, before the cut."""
    _offered: Counter[tuple[str, Side]] = field(default_factory=Counter)
    _sides: dict[bytes, Side] = field(default_factory=dict)

    def room(self, side: Side) -> int:
        """Tokens that `side` still takes."""
        return self.plan.target(side) - sum(count for (_, filled), count in self.used.items() if filled == side)

    @property
    def done(self) -> bool:
        return self.room("train") <= 0 and self.room("heldout") <= 0

    def longer_documents(self) -> int | None:
        """How many tokens of a document to read instead, in whole blocks, where the cut left the parts unfilled."""
        cap, block = self.plan.max_document_tokens, self.plan.block_length
        if cap is None or self.done or not self.lengths:
            return None
        needed = self.room("train") + self.room("heldout")
        most = math.ceil(max(self.lengths) / block)

        def suffices(blocks: int) -> bool:
            return sum(max(0, min(length, blocks * block) - cap) for length in self.lengths) >= needed

        return block * bisect_left(range(most), True, key=suffices)

    def place(self, document: Document, ids: list[int]) -> tuple[Side, list[int]]:
        """The side that takes `document`, and as many of its tokens as there is room for (perhaps none)."""
        digest = hashlib.blake2b(document.text.encode(), digest_size=8).digest()
        side = self._sides.setdefault(digest, self._choose(document.source))
        kept = ids[: max(0, self.room(side))]
        self.available_tokens += len(ids)
        self.seen_documents += 1
        self._offered[document.source, side] += len(ids)
        if kept:
            self.used[document.source, side] += len(kept)
            self.documents[document.source] += 1
        return side, kept

    def _choose(self, source: str) -> Side:
        if self.room("heldout") <= 0:
            return "train"
        if self.room("train") <= 0:
            return "heldout"
        heldout, train = self._offered[source, "heldout"], self._offered[source, "train"]
        share = self.plan.heldout_tokens / (self.plan.heldout_tokens + self.plan.train_tokens)
        first_block = self.plan.block_length / self.num_sources
        return "heldout" if heldout < max(share * (heldout + train), first_block) else "train"


def pack_documents(
    encoded: Iterable[tuple[Document, list[int]]],
    plan: BlockPlan,
    num_sources: int,
    writers: dict[Side, BlockWriter],
    task: Task,
) -> Filling:
    """Write documents into the two parts until both are full or the text ends."""
    filling = Filling(plan, num_sources)
    for document, ids in encoded:
        if plan.max_document_tokens is not None and len(ids) > plan.max_document_tokens:
            filling.lengths.append(len(ids))
        side, kept = filling.place(document, ids[: plan.max_document_tokens])
        if kept:
            writers[side].append(kept)
            task.advance(len(kept), documents=filling.documents.total())
        if filling.done:
            break
    return filling
