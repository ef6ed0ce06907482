"""What a search has finished, so that an interrupted one goes on: a file of facts each, some with tensors beside it.

Facts are sealed and name the work by its fingerprint; tensors are written before them and hashed in them. So nothing
half-written is taken for whole, and nothing that was found for other options.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from factorctl.checkpoint.reader import CheckpointReader
from factorctl.checkpoint.writer import write_shard
from factorctl.errors import IntegrityError
from factorctl.files.hashing import hash_file
from factorctl.files.publishing import make_directory, writable, write_file
from factorctl.files.strict_json import dump_sealed, read_sealed


class SearchState:
    """The finished parts of one search, by name."""

    def __init__(self, directory: Path, fingerprint: str) -> None:
        self._directory, self._fingerprint = directory, fingerprint

    def found(self, name: str) -> dict[str, Any] | None:
        """The facts of a part that was finished for this very work and is whole, else None."""
        path = self._directory / f"{name}.json"
        try:
            entry = read_sealed(path) if path.is_file() else {}
        except IntegrityError:
            return None
        facts, recorded = entry.get("facts"), entry.get("tensors")
        if entry.get("fingerprint") != self._fingerprint or not isinstance(facts, dict):
            return None
        if recorded is not None:
            tensors = self._tensors_of(name)
            if not tensors.is_file() or asdict(hash_file(tensors)) != recorded:
                return None
        return facts

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a part that was `found`."""
        reader = CheckpointReader.of_file(self._tensors_of(name))
        return reader.read_all(reader.entries)

    def keep(self, name: str, facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        """Record a finished part; its facts are written last."""
        make_directory(self._directory)
        recorded = None if tensors is None else asdict(write_shard(self._tensors_of(name), tensors))
        content = {"fingerprint": self._fingerprint, "facts": dict(facts), "tensors": recorded}
        write_file(self._directory / f"{name}.json", dump_sealed(content))

    def forget_others(self) -> None:
        """Remove what was kept for other work, or is damaged."""
        with writable(self._directory):
            for path in self._directory.iterdir():
                if self.found(path.stem) is None:
                    path.unlink()

    def _tensors_of(self, name: str) -> Path:
        return self._directory / f"{name}.safetensors"
