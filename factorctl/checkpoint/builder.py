"""Building an artefact directory step by step, so that an interrupted run goes on where it stopped.

Everything goes into the partial sibling of the final directory. A journal beside it names the work (its fingerprint)
and, per finished shard, the file's hash and what the run needs to know of it. The manifest comes last, then the
rename. The journal outlives the rename, so that a kill at any moment before it loses no finished shard.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from factorctl.checkpoint.manifest import MANIFEST_NAME, Manifest, write_manifest
from factorctl.checkpoint.reader import INDEX_NAME
from factorctl.checkpoint.writer import shard_name, write_index, write_shard
from factorctl.errors import FactorctlError, IntegrityError, ResourceError
from factorctl.files.hashing import FileRecord, hash_bytes, hash_file
from factorctl.files.names import TEMPLATES, name_in_artefact
from factorctl.files.publishing import (
    make_directory,
    partial_path,
    publish_directory,
    refuse_existing,
    sole_writer,
    writable,
    write_file,
)
from factorctl.files.strict_json import dump_sealed, read_sealed
from factorctl.progress import Progress


def journal_path(final: Path) -> Path:
    """Where the unfinished artefact `final` keeps account of its finished shards."""
    return final.with_name(f".{final.name}.journal.json")


class ArtefactBuilder:
    """Files of one artefact in the making. Open it with `building`."""

    def __init__(self, final: Path, *, num_shards: int, fingerprint: str, progress: Progress) -> None:
        self.final, self.partial, self.num_shards = final, partial_path(final), num_shards
        self._fingerprint = fingerprint
        self._files: dict[str, FileRecord] = {}
        self._journal = self._resumed(progress) or {}
        with writable(self.partial):
            if not self._journal:
                shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True, exist_ok=True)

    def finished(self, index: int) -> dict[str, Any] | None:
        """What was recorded with shard `index` if an earlier run finished it, else None."""
        entry = self._journal.get(str(index))
        return None if entry is None else dict(entry["note"])

    def shard_path(self, index: int) -> Path:
        return self.partial / shard_name(index, self.num_shards)

    def write_shard(self, index: int, tensors: Mapping[str, torch.Tensor], note: Mapping[str, Any]) -> None:
        """Write one shard and record `note` (a JSON value) with it in the journal."""
        record = write_shard(self.shard_path(index), tensors)
        names = {name: tensor.nbytes for name, tensor in tensors.items()}
        self._journal[str(index)] = {"file": asdict(record), "tensors": names, "note": dict(note)}
        write_file(journal_path(self.final), dump_sealed({"fingerprint": self._fingerprint, "shards": self._journal}))

    def write_file(self, name: str, data: bytes) -> None:
        path = self.partial / name
        if path.parent != self.partial:
            make_directory(path.parent)
        write_file(path, data)
        self._files[name] = hash_bytes(data)

    def copy_file(self, path: Path) -> None:
        """Copy a tokenizer's or licence file byte for byte under the same name."""
        self.write_file(name_in_artefact(path), path.read_bytes())

    def adopt_file(self, name: str) -> None:
        """Count a file that a library wrote straight into `partial` (a .gguf, say) among the artefact's."""
        with writable(self.partial / name), (self.partial / name).open("rb") as file:
            os.fsync(file.fileno())
        self._files[name] = hash_file(self.partial / name)

    def write_index(self) -> None:
        """Name every shard in the index: from here on `partial` loads like the finished directory."""
        weight_map: dict[str, str] = {}
        weight_bytes = 0
        for index in range(self.num_shards):
            entry = self._journal[str(index)]
            self._files[shard_name(index, self.num_shards)] = FileRecord(**entry["file"])
            weight_map |= dict.fromkeys(entry["tensors"], shard_name(index, self.num_shards))
            weight_bytes += sum(entry["tensors"].values())
        self._files[INDEX_NAME] = write_index(self.partial, weight_map, weight_bytes)

    def publish(self, manifest: Manifest) -> Manifest:
        """Complete the manifest with every file's hash, write it and give the directory its final name."""
        if self.num_shards:
            self.write_index()
        complete = replace(manifest, files=dict(sorted(self._files.items())))
        write_manifest(self.partial, complete)
        with writable(self.partial):
            self._remove_strangers()
        publish_directory(self.partial, self.final)
        with writable(journal_path(self.final)):
            journal_path(self.final).unlink(missing_ok=True)
        return complete

    def discard(self) -> None:
        """Remove what was built so far."""
        shutil.rmtree(self.partial, ignore_errors=True)
        with suppress(OSError):
            journal_path(self.final).unlink()

    def _remove_strangers(self) -> None:
        """Drop what a killed run left behind: only files of the manifest are published."""
        known = {name.partition("/")[0] for name in self._files} | {MANIFEST_NAME}
        templates = [path for path in (self.partial / TEMPLATES).glob("*") if name_in_artefact(path) not in self._files]
        for path in [*self.partial.iterdir(), *templates]:
            if path in templates or path.name not in known:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)

    def _resumed(self, progress: Progress) -> dict[str, Any] | None:
        """The journal's shards if they belong to this very work and are whole, else None."""
        path = journal_path(self.final)
        if not path.exists() or not self.partial.is_dir():
            return None
        try:
            journal = read_sealed(path)
            entries = {str(int(index)): _checked_entry(entry) for index, entry in journal["shards"].items()}
        except (IntegrityError, KeyError, TypeError, ValueError, AttributeError):
            progress.note(f"the journal of the unfinished work in {self.partial} is unreadable; starting over")
            return None
        if journal.get("fingerprint") != self._fingerprint:
            progress.note(
                f"the unfinished work in {self.partial} was for other options or another source; starting over"
            )
            return None
        whole = {index: entry for index, entry in entries.items() if self._is_whole(int(index), entry)}
        progress.note(f"resuming: {len(whole)} of {self.num_shards} shards are already written")
        return whole

    def _is_whole(self, index: int, entry: Mapping[str, Any]) -> bool:
        path = self.shard_path(index)
        return path.is_file() and asdict(hash_file(path)) == entry["file"]


@contextmanager
def building(
    final: Path, *, num_shards: int, fingerprint: str, overwrite: bool, progress: Progress
) -> Iterator[ArtefactBuilder]:
    """An `ArtefactBuilder` for `final`, held by this process alone.

    An interrupted run and one that ran out of disk or memory leave their finished shards for the next to go on from;
    one that failed for another reason would fail again, and leaves nothing.

    Raises:
        UsageError: `final` exists and `overwrite` is false, or another process writes it.
    """
    refuse_existing(final, overwrite=overwrite)
    with sole_writer(final):
        refuse_existing(final, overwrite=overwrite)  # another run may have published it before we held the lock
        builder = ArtefactBuilder(final, num_shards=num_shards, fingerprint=fingerprint, progress=progress)
        try:
            yield builder
        except ResourceError:
            raise
        except FactorctlError:
            builder.discard()
            raise


def _checked_entry(entry: Any) -> dict[str, Any]:
    """A journal entry with the parts that resuming relies on, or an error that reading JSON could raise as well."""
    names, note = entry["tensors"], entry["note"]
    if not (isinstance(note, dict) and all(isinstance(size, int) for size in names.values())):
        raise TypeError("a damaged entry")
    return {"file": asdict(FileRecord(**entry["file"])), "tensors": names, "note": note}
