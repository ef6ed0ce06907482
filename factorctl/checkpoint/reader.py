"""Reading a safetensors checkpoint tensor by tensor, with every name, file and byte accounted for.

Tensors are read into fresh memory, not mapped: the resident size of a run is what it holds, not what it has touched.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from factorctl.errors import IntegrityError, UsageError
from factorctl.files.first_bytes import looks_like, next_step
from factorctl.files.names import plain_name
from factorctl.files.strict_json import parse_json_object, read_json_object

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
COMPUTED = "rotary_emb.inv_freq"
"""Ends the names of rotary frequencies, which old writers stored, in and out of their index; they are computed."""
_WRAPPERS = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every name."""
_SHARD_NAME = re.compile(r"model-\d+-of-\d+\.safetensors")

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies on disk and what it is."""

    name: str
    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Byte offset in the file."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class CheckpointReader:
    """The tensors of a checkpoint directory, by name.

    Raises:
        IntegrityError: a shard is missing, extra, truncated or corrupt, the index disagrees with the shards,
            or a name leads out of the directory.
        UsageError: there are no safetensors here at all.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        entries: dict[str, TensorEntry] = {}
        for file, promised in _shards(directory).items():
            found = _read_header(directory / file)
            if promised is not None and (fault := _disagreement(directory / file, promised, {e.name for e in found})):
                raise IntegrityError(fault, "index and shards are of different versions: fetch the checkpoint again")
            entries.update((entry.name, entry) for entry in found)
        self.entries = _in_causal_model(entries)

    @classmethod
    def of_file(cls, path: Path) -> CheckpointReader:
        """The tensors of one safetensors file alone."""
        return cls.of_entries(path.parent, _read_header(path))

    @classmethod
    def of_entries(cls, directory: Path, entries: Iterable[TensorEntry]) -> CheckpointReader:
        """Tensors that are known already, or of a checkpoint that has yet to be written: sizes without values."""
        reader = cls.__new__(cls)
        reader.directory = directory
        reader.entries = {entry.name: entry for entry in entries}
        return reader

    @property
    def files(self) -> list[str]:
        return sorted({entry.file for entry in self.entries.values()})

    @property
    def num_values(self) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(entry.shape) for entry in self.entries.values())

    @property
    def matrix_dtype(self) -> torch.dtype:
        """The narrowest dtype that holds every matrix exactly; norms and biases may be stored wider."""
        found = [entry.dtype for entry in self.entries.values() if entry.dtype.is_floating_point]
        matrices = [e.dtype for e in self.entries.values() if e.dtype.is_floating_point and len(e.shape) > 1]
        return reduce(torch.promote_types, matrices or found, (matrices or found or [torch.float32])[0])

    def entry(self, name: str) -> TensorEntry:
        if name not in self.entries:
            raise IntegrityError(f"{self.directory} holds no tensor {name!r}")
        return self.entries[name]

    def read(self, name: str) -> torch.Tensor:
        """The tensor in fresh memory, in its stored dtype, with every value checked to be finite.

        Raises:
            IntegrityError: the tensor is absent, cut short, or holds NaN or Inf.
        """
        entry = self.entry(name)
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        if tensor.numel():
            buffer = tensor.view(-1).view(torch.uint8).numpy()
            with (self.directory / entry.file).open("rb") as file:
                file.seek(entry.start)
                if file.readinto(buffer.data) != entry.nbytes:
                    raise IntegrityError(f"{self.directory / entry.file} ends inside tensor {name}")
        if not all_finite(tensor):
            raise IntegrityError(
                f"tensor {name} in {self.directory / entry.file} holds NaN or Inf",
                "the source is damaged: fetch it again",
            )
        return tensor

    def read_all(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        return {name: self.read(name) for name in names}


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or Inf; one pass, no temporary of the tensor's size."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)  # NaN wins both, Inf wins one
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _shards(directory: Path) -> dict[str, set[str] | None]:
    """File name -> tensor names that the index promises there (None: a single file has no index)."""
    present = {path.name for path in directory.glob("*.safetensors")}
    if (directory / INDEX_NAME).exists():
        promised = _indexed(directory / INDEX_NAME)
        for file in sorted(promised):
            if file not in present:
                raise IntegrityError(
                    f"{directory / file}, named by {INDEX_NAME}, is missing", "fetch the checkpoint again"
                )
        _refuse_extra(directory, present - promised.keys(), f"is not in {INDEX_NAME}")
        return dict(promised)
    if SINGLE_NAME in present:
        _refuse_extra(directory, present - {SINGLE_NAME}, f"lies beside {SINGLE_NAME}")
        return {SINGLE_NAME: None}
    if any(_SHARD_NAME.fullmatch(file) for file in present):
        raise IntegrityError(f"{directory} holds shards but no {INDEX_NAME}", "fetch the checkpoint again")
    raise UsageError(
        f"{directory} holds no {SINGLE_NAME}",
        "only safetensors are read, no pickled .bin or .pt files; convert it with transformers' save_pretrained",
    )


def _refuse_extra(directory: Path, others: set[str], fault: str) -> None:
    """Refuse weights that another reader might take instead; adapters and other formats may lie there."""
    extra = sorted(file for file in others if file == SINGLE_NAME or _SHARD_NAME.fullmatch(file))
    if extra:
        raise IntegrityError(
            f"{directory / extra[0]} {fault}", "two checkpoints seem to be mixed: remove the other one"
        )


def _indexed(path: Path) -> dict[str, set[str]]:
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise IntegrityError(f"{path} holds no weight_map")
    promised: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        promised.setdefault(plain_name(file, origin=str(path)), set()).add(tensor)
    return promised


def _read_header(path: Path) -> list[TensorEntry]:
    """The entries of one shard, after the library has checked header, bounds and holes."""
    if not path.is_file():  # a pipe would be waited for
        raise IntegrityError(f"{path} is no regular file", "fetch the checkpoint again")
    if (found := looks_like(path)) not in (None, "a safetensors file"):
        raise IntegrityError(f"{path} is {found}", next_step(path))
    try:
        with safe_open(path, "pt"):
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = parse_json_object(file.read(length).decode(), origin=f"the header of {path}")
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise IntegrityError(f"{path} is truncated or corrupt: {error}", "fetch the file again") from None
    header.pop("__metadata__", None)
    return [
        TensorEntry(
            name,
            path.name,
            _dtype(path, name, info["dtype"]),
            tuple(info["shape"]),
            8 + length + info["data_offsets"][0],
        )
        for name, info in header.items()
    ]


def _dtype(path: Path, name: str, code: str) -> torch.dtype:
    if code not in DTYPES:
        raise UsageError(
            f"tensor {name} in {path} is stored as {code}, a quantised format",
            f"give an unquantised checkpoint; dtypes that can be split: {', '.join(DTYPES)}",
        )
    return DTYPES[code]


def _disagreement(path: Path, promised: set[str], found: set[str]) -> str | None:
    """What index and shard differ in, rotary frequencies apart."""
    missing, extra = (
        sorted(name for name in names if not name.endswith(COMPUTED)) for names in (promised - found, found - promised)
    )
    if missing:
        return f"{path} lacks tensor {missing[0]}, which {INDEX_NAME} promises there"
    return f"{path} holds tensor {extra[0]}, which {INDEX_NAME} does not list there" if extra else None


def _in_causal_model(entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The entries by the names that they have in a causal language model.

    A wrapper's prefix is taken off, and "model." put before the names of a checkpoint that was saved from the base
    model, as transformers does when it loads one.
    """
    named = dict(entries)
    for prefix in _WRAPPERS:
        if named and all(name.startswith(prefix) for name in named):
            named = {name.removeprefix(prefix): entry for name, entry in named.items()}
    if "embed_tokens.weight" in named and "model.embed_tokens.weight" not in named:
        named = {name if name.startswith("lm_head.") else f"model.{name}": entry for name, entry in named.items()}
    return {name: replace(entry, name=name) for name, entry in named.items()}
