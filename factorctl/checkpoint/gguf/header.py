"""The header of a GGUF file: its keys and its table of tensors, read through llama.cpp's own package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from factorctl.errors import IntegrityError, UsageError, in_one_line
from factorctl.files.first_bytes import is_gguf, refuse_as_model

GIVE_HF = "give the model's Hugging Face directory instead"


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file; its values are still on disk."""

    name: str
    shape: tuple[int, ...]
    """As torch has it: rows first."""
    type_name: str
    num_bytes: int
    stored: Any
    """The reader's own record."""

    def dequantised(self) -> np.ndarray:
        """The values in float32, shaped as `shape`."""
        from gguf import dequantize

        values: np.ndarray = dequantize(self.stored.data, self.stored.tensor_type)
        return np.ascontiguousarray(values, dtype=np.float32).reshape(self.shape)


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself."""

    path: Path
    keys: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        return str(self.keys["general.architecture"])

    @cached_property
    def tensor_types(self) -> list[str]:
        """The types inside, most bytes first: ['Q4_1', 'F32']."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.type_name] = sizes.get(tensor.type_name, 0) + tensor.num_bytes
        return sorted(sizes, key=lambda name: -sizes[name])

    @property
    def is_quantised(self) -> bool:
        return not set(self.tensor_types) <= {"F32", "F16", "BF16"}


def read_gguf_header(path: Path) -> GgufHeader:
    """The header of a file that holds one whole model.

    Raises:
        UsageError: no GGUF file, a damaged one, or one that holds something else than a model.
        IntegrityError: one of several files that a model was split into.
    """
    if not is_gguf(path):
        raise refuse_as_model(path)
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        tensors = {
            tensor.name: GgufTensor(
                name=tensor.name,
                shape=tuple(int(size) for size in reversed(tensor.shape.tolist())),
                type_name=tensor.tensor_type.name,
                num_bytes=int(tensor.n_bytes),
                stored=tensor,
            )
            for tensor in reader.tensors
        }
    except Exception as error:  # the reader trusts its offsets: a damaged file fails anywhere in it
        raise UsageError(f"{path} is no readable GGUF file: {in_one_line(error)}", "fetch the file again") from error
    header = GgufHeader(path, keys, tensors)
    _refuse_other_contents(header)
    return header


def _refuse_other_contents(header: GgufHeader) -> None:
    if not isinstance(header.keys.get("general.architecture"), str):
        raise UsageError(f"{header.path} lacks the key general.architecture", "fetch the file again")
    kind = header.keys.get("general.type", "model")
    if kind != "model":
        raise UsageError(
            f"{header.path} holds no model: its general.type is {kind!r}", "give the .gguf file of the dense model"
        )
    if int(header.keys.get("split.count", 0) or 0) > 1:
        raise IntegrityError(
            f"{header.path} is part {int(header.keys.get('split.no', 0)) + 1} of a model split over "
            f"{header.keys['split.count']} files",
            "merge them first: llama-gguf-split --merge FIRST-PART MERGED.gguf",
        )
