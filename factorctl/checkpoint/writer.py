"""Writing shards: one per decoder layer plus one for the rest, each atomic, hashed as it is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save

from factorctl.checkpoint.hashing import FileRecord, hash_bytes
from factorctl.checkpoint.publishing import write_file
from factorctl.checkpoint.reader import INDEX_NAME
from factorctl.checkpoint.strict_json import dump_json


def shard_name(index: int, total: int) -> str:
    """'model-00002-of-00031.safetensors' for index 1 of 31."""
    return f"model-{index + 1:05d}-of-{total:05d}.safetensors"


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor]) -> FileRecord:
    """Write the tensors as one safetensors file: the same tensors give the same bytes."""
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata={"format": "pt"})
    write_file(path, data)
    return hash_bytes(data)


def write_index(directory: Path, weight_map: Mapping[str, str], total_size: int) -> FileRecord:
    """The index that Hugging Face readers expect: tensor name -> file."""
    data = dump_json({"metadata": {"total_size": total_size}, "weight_map": dict(weight_map)})
    write_file(directory / INDEX_NAME, data)
    return hash_bytes(data)
