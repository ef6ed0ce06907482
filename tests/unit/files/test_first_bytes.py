"""What a file is, told by its first bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from factorctl.files.first_bytes import looks_like, next_step


@pytest.mark.parametrize("length", [80, 128, 384, 1152])
def test_a_safetensors_header_of_any_length_is_no_pickle(length: int, tmp_path: Path) -> None:
    """Its length in bytes comes first; 128 and every 256 more begin as Python's pickles do."""
    path, header = tmp_path / "model.safetensors", json.dumps({"__metadata__": {"format": "pt"}}).ljust(length)
    path.write_bytes(length.to_bytes(8, "little") + header.encode())
    assert looks_like(path) == "a safetensors file"
    assert "pickled" not in next_step(path)


def test_a_pickle_is_one(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(b"\x80\x02}q\x00.")
    assert looks_like(path) == "a Python pickle"
    assert "pickled weights are not read" in next_step(path)
