"""Writing shards: one per decoder layer plus one for the rest, each atomic, hashed as it is written."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from factorctl.checkpoint.reader import DTYPES, INDEX_NAME
from factorctl.files.hashing import FileRecord, hash_bytes
from factorctl.files.publishing import temporary_path, writable, write_file
from factorctl.files.strict_json import dump_json

PIECE_BYTES = 1 << 20
_CODES = {dtype: code for code, dtype in DTYPES.items()}


def shard_name(index: int, total: int) -> str:
    """'model-00002-of-00031.safetensors' for index 1 of 31."""
    return f"model-{index + 1:05d}-of-{total:05d}.safetensors"


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor]) -> FileRecord:
    """Write the tensors as one safetensors file: the same tensors give the same bytes.

    The library would first join all tensors in memory; here every piece goes to the hash and to the file while it is
    still in the processor's cache, and no second copy is held.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))  # wide types first: aligned
    digest, size, temporary = hashlib.sha256(), 0, temporary_path(path)
    with writable(path):
        with temporary.open("wb") as file:
            for piece in _pieces(ordered):
                digest.update(piece)
                size += file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    return FileRecord(sha256=digest.hexdigest(), size=size)


def _pieces(ordered: Sequence[tuple[str, torch.Tensor]]) -> Iterator[memoryview | bytes]:
    """The file's bytes: length of the header, header, then every tensor's values."""
    yield _header(ordered)
    for _, tensor in ordered:
        values = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data
        for start in range(0, len(values), PIECE_BYTES):
            yield values[start : start + PIECE_BYTES]


def _header(ordered: Sequence[tuple[str, torch.Tensor]]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_index(directory: Path, weight_map: Mapping[str, str], total_size: int) -> FileRecord:
    """The index that Hugging Face readers expect: tensor name -> file."""
    data = dump_json({"metadata": {"total_size": total_size}, "weight_map": dict(weight_map)})
    write_file(directory / INDEX_NAME, data)
    return hash_bytes(data)
