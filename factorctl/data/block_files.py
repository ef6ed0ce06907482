"""Writing token blocks: .npy files that grow, and the account of them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import DTypeLike, NDArray

from factorctl.data.blocks import CONTENT, META_NAME, Side, content_hash


class BlockWriter:
    """One side of the blocks, `<side>.npy`, written as the tokens come; memory holds no more than one document."""

    def __init__(self, directory: Path, side: Side, block_length: int, dtype: DTypeLike) -> None:
        self.side = side
        self.tokens = 0
        self.documents = 0
        self._directory = directory
        self._block_length = block_length
        self._dtype = np.dtype(dtype)
        self._starts: list[int] = []
        self._stream = (directory / f"{side}.npy").open("wb")
        _write_header(self._stream, 0, block_length, self._dtype)
        self._header_bytes = self._stream.tell()

    @property
    def blocks(self) -> int:
        """Whole blocks written so far."""
        return self.tokens // self._block_length

    def append(self, ids: Sequence[int]) -> None:
        """Add one document."""
        self._stream.write(np.asarray(ids, dtype=self._dtype).tobytes())
        self._starts.append(self.tokens)
        self.tokens += len(ids)
        self.documents += 1

    def finish(self) -> dict[str, int]:
        """Drop the tokens behind the last whole block, put the shape into the header, and make all durable."""
        kept = self.blocks * self._block_length
        starts = np.array([start for start in self._starts if start < kept], dtype=np.int64)
        self._stream.truncate(self._header_bytes + kept * self._dtype.itemsize)
        self._stream.seek(0)
        _write_header(self._stream, self.blocks, self._block_length, self._dtype)
        _sync(self._stream)
        _save_array(self._directory / f"{self.side}_starts.npy", starts)
        return {"blocks": self.blocks, "documents": len(starts), "dropped_tokens": self.tokens - kept}

    def __enter__(self) -> BlockWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stream.close()


def write_meta(directory: Path, meta: dict[str, Any]) -> None:
    """Write meta.json over finished arrays, with the hash of all content."""
    sealed = {**meta, CONTENT: content_hash(directory, meta)}
    with (directory / META_NAME).open("wb") as stream:
        stream.write(json.dumps(sealed, indent=1, sort_keys=True).encode())
        _sync(stream)


def _write_header(stream: IO[bytes], blocks: int, block_length: int, dtype: np.dtype[Any]) -> None:
    # numpy leaves room for the first axis to grow, so the header keeps its length for any number of blocks
    shape = {"shape": (blocks, block_length), "fortran_order": False, "descr": npy.dtype_to_descr(dtype)}
    npy.write_array_header_1_0(stream, shape)


def _save_array(path: Path, array: NDArray[Any]) -> None:
    with path.open("wb") as stream:
        np.save(stream, array, allow_pickle=False)
        _sync(stream)


def _sync(stream: IO[bytes]) -> None:
    stream.flush()
    os.fsync(stream.fileno())
