"""One export as the writers see it, and what they give back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from factorctl.checkpoint.builder import ArtefactBuilder
from factorctl.checkpoint.reader import CheckpointReader
from factorctl.config.export import ExportConfig
from factorctl.exporting.check.comparison import Agreement, Proof
from factorctl.exporting.check.rounding import Rounding
from factorctl.exporting.forms import Form
from factorctl.ffn.spec import FactoredSpec
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
    fits_in_memory: bool
    """Whether the whole model does in float64: else stock transformers is asked layer by layer."""
    device: torch.device
    """Where the native model runs; engines run on the CPU."""
    shifts: tuple[int, ...] = ()
    """Per layer the power of two that its router is divided by, for gate `hard` at K > 1."""

    @property
    def native_spec(self) -> FactoredSpec:
        """What the checkpoint is, with the number of active experts that the form equals."""
        return self.checkpoint.spec.with_top_k(self.form.top_k)

    @property
    def context(self) -> int:
        return int(self.checkpoint.dense.config.max_position_embeddings)

    @property
    def licences(self) -> list[Path]:
        return [path for path in self.copied if path.name.upper().startswith(("LICENSE", "NOTICE", "USE_POLICY"))]


@dataclass(frozen=True)
class Verified:
    """What the stock engine made of the export."""

    engine: str
    agreement: Agreement | None
    """None where nothing was run."""
    memory_bytes: int | None = None
    """What the engine held for the weights after loading, where it loaded them as users will."""
    proof: Proof | None = None
    rounding: Rounding | None = None
    """None where no value was rounded."""
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

    def verify(self, builder: ArtefactBuilder, progress: Progress) -> Verified:
        """Load what was written in the stock engine and compare.

        Raises:
            FactorctlError: it does not load, or computes something else.
        """
        ...
