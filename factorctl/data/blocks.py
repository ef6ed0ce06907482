"""Token blocks on disk, memory-mapped, and where documents begin in them.

A cache directory holds, for the training side and the held-out side, `<side>.npy` [blocks, block_length] in uint16
(uint32 for vocabularies above 65,536) and `<side>_starts.npy` [documents] in int64: the offsets, in the flattened
array, at which a document begins. `meta.json` says what they were made from, and what their content hashes to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from factorctl.data.identity import hash_json
from factorctl.errors import IntegrityError

Side = Literal["train", "heldout"]
META_NAME = "meta.json"
CONTENT = "content_sha256"
"""Key of the hash over all else in the directory."""


@dataclass(frozen=True)
class TokenBlocks:
    """Text as blocks of `block_length` token ids, with a held-out side of other documents."""

    train: NDArray[np.unsignedinteger[Any]]
    """[blocks, block_length], memory-mapped."""
    heldout: NDArray[np.unsignedinteger[Any]]
    """[held-out blocks, block_length], memory-mapped; no document of it is in `train`."""
    train_starts: NDArray[np.int64]
    """Offsets into `train.reshape(-1)` at which a document begins, ascending."""
    heldout_starts: NDArray[np.int64]
    path: Path
    meta: dict[str, Any]
    """The content of meta.json."""

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over everything that decides the content: text, tokenizer, options, seed, code version."""
        return str(self.meta["fingerprint"])

    @property
    def block_length(self) -> int:
        return int(self.train.shape[1])

    @property
    def tokens(self) -> int:
        """Tokens in `train`."""
        return int(self.train.size)

    @property
    def documents(self) -> int:
        """Documents in `train`, the last one perhaps cut."""
        return int(self.meta["train"]["documents"])

    @property
    def sources(self) -> list[dict[str, Any]]:
        """Where the text came from: kind, file hashes or Hub commit, weight, and tokens and documents taken."""
        return list(self.meta["sources"])

    @property
    def record(self) -> dict[str, Any]:
        """What a manifest says of the text."""
        return {"fingerprint": self.fingerprint, "tokens": self.tokens, "sources": self.sources}

    def position_ids(self, side: Side, rows: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """Positions that restart at 0 at each document and each block, [len(rows), block_length].

        Passed to a transformers model with `attention_mask=None` and `use_cache=False`, they alone make the
        attention block-diagonal: `masking_utils.find_packed_sequence_indices` finds the documents by their restarts.
        """
        starts_BL = self._begins(side, rows)
        columns_L = np.arange(self.block_length, dtype=np.int64)
        return columns_L - np.maximum.accumulate(np.where(starts_BL, columns_L, 0), axis=1)

    def _begins(self, side: Side, rows: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
        """Whether a document begins at a token, [len(rows), block_length]."""
        starts = self.train_starts if side == "train" else self.heldout_starts
        begins_BL = np.zeros((len(rows), self.block_length), dtype=np.bool_)
        for index, row in enumerate(np.asarray(rows).tolist()):
            first, last = np.searchsorted(starts, (row * self.block_length, (row + 1) * self.block_length))
            begins_BL[index, starts[first:last] - row * self.block_length] = True
        return begins_BL


def open_token_blocks(path: Path) -> TokenBlocks:
    """Map the blocks of one cache directory.

    Raises:
        IntegrityError: a file is missing, or is not what meta.json says.
    """
    try:
        meta = json.loads((path / META_NAME).read_text(encoding="utf-8"))
        arrays = {side: _map(path / f"{side}.npy") for side in ("train", "heldout")}
        if meta.get(CONTENT) != content_hash(path, meta):
            raise ValueError("its content is not what was written")
        starts = {side: np.load(path / f"{side}_starts.npy", allow_pickle=False) for side in ("train", "heldout")}
        shapes = {side: (int(meta[side]["blocks"]), int(meta["block_length"])) for side in ("train", "heldout")}
    except (AttributeError, OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise IntegrityError(f"token cache {path} cannot be read: {error}", "delete it and run again") from error
    for side, array in arrays.items():
        if array.shape != shapes[side]:
            raise IntegrityError(
                f"token cache {path}: {side}.npy is {array.shape}, {META_NAME} says {shapes[side]}",
                "delete it and run again",
            )
    return TokenBlocks(arrays["train"], arrays["heldout"], starts["train"], starts["heldout"], path, meta)


def content_hash(directory: Path, meta: Mapping[str, Any]) -> str:
    """sha256 (hex) over the arrays in a directory and over what its meta.json says."""
    arrays = [f"{side}{kind}.npy" for side in ("train", "heldout") for kind in ("", "_starts")]
    said = {key: value for key, value in meta.items() if key != CONTENT}
    return hash_json([said, *(_hash_file(directory / name) for name in arrays)])


def _hash_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _map(path: Path) -> NDArray[np.unsignedinteger[Any]]:
    array: NDArray[np.unsignedinteger[Any]] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array
