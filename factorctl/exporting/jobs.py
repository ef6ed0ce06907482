"""One export as the writers see it, and what they give back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from factorctl.checkpoint.builder import ArtefactBuilder
from factorctl.checkpoint.reader import CheckpointReader
from factorctl.config import ExportConfig
from factorctl.exporting.comparison import Agreement, Fidelity
from factorctl.exporting.forms import Form
from factorctl.exporting.native_reference import NativeReference
from factorctl.models.loading import NativeCheckpoint
from factorctl.progress import Progress


@dataclass(frozen=True)
class ExportJob:
    """A checkpoint, the form it is to take, and what native and export are asked."""

    config: ExportConfig
    checkpoint: NativeCheckpoint
    reader: CheckpointReader
    form: Form
    copied: tuple[Path, ...]
    """Tokenizer, generation config and licence files, which travel byte for byte."""
    sequences: list[list[int]]
    tokenise: Callable[[str], list[int]] | None
    """The model's own tokenizer, special tokens included; None where it has none."""
    compute: torch.dtype
    """What the native and the exported model are compared in."""

    @property
    def fidelity(self) -> Fidelity:
        """How near the comparison has to come: 16-bit arithmetic itself rounds what is stored exactly."""
        if self.form.fidelity is Fidelity.EXACT and self.compute.itemsize < 4:
            return Fidelity.ROUNDED
        return self.form.fidelity

    @property
    def licences(self) -> list[Path]:
        return [path for path in self.copied if path.name.upper().startswith(("LICENSE", "NOTICE", "USE_POLICY"))]


@dataclass(frozen=True)
class Verified:
    """What the stock engine made of the export."""

    engine: str
    agreement: Agreement | None
    """None where no engine was at hand: the file was read back and compared instead."""
    memory_bytes: int | None = None
    """What the engine held for the weights after loading."""
    notes: tuple[str, ...] = ()
    """What the comparison has to say beyond its figures."""
    bits_per_weight: float | None = None
    """Of a GGUF file, over all its tensors."""


class Writer(Protocol):
    """Writes one kind of file and has it checked by the engine that reads it."""

    num_shards: int
    weight_bytes: int
    notes: list[str]

    def write(self, builder: ArtefactBuilder, progress: Progress) -> None:
        """Everything but card and manifest."""

    def verify(self, builder: ArtefactBuilder, reference: NativeReference, progress: Progress) -> Verified:
        """Load what was written in the stock engine and compare.

        Raises:
            FactorctlError: it does not load, or computes something else.
        """
        ...
