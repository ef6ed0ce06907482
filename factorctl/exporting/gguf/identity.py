"""What a GGUF file says of itself: a name to read, what it was made from, its licence and its size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFType, GGUFWriter
from gguf.utility import size_label

from factorctl.exporting.origin import base_name, licence_of
from factorctl.exporting.stock.shards import PlannedTensor


@dataclass(frozen=True)
class Identity:
    """The keys `general.*` that hubs and programs show."""

    name: str
    base_name: str
    base_organization: str | None
    base_url: str | None
    licence: str | None
    size: str

    def add_to(self, writer: GGUFWriter) -> None:
        writer.add_type(GGUFType.MODEL)
        writer.add_name(self.name)
        writer.add_size_label(self.size)
        if self.licence is not None:
            writer.add_license(self.licence)
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, self.base_name)
        if self.base_organization is not None:
            writer.add_base_model_organization(0, self.base_organization)
        if self.base_url is not None:
            writer.add_base_model_repo_url(0, self.base_url)


def identity_of(
    source: Mapping[str, Any],
    config: Mapping[str, Any],
    licences: Sequence[Path],
    tensors: Sequence[PlannedTensor],
    *,
    notation: str,
    num_experts: int,
) -> Identity:
    """The identity of an export.

    Args:
        source: the manifest's account of the dense model.
        config: the dense model's config.json.
        licences: licence files that travel with the export.
        tensors: the file's.
        notation: of the split, e.g. `1R4E2K`.
    """
    base, organization = base_name(source, config)
    is_on_hub = source.get("kind") == "hub"
    return Identity(
        name=f"{base} {notation}",
        base_name=base,
        base_organization=organization,
        base_url=f"https://huggingface.co/{source['id']}" if is_on_hub else None,
        licence=licence_of(source, config, licences),
        size=_size(tensors, num_experts),
    )


def _size(tensors: Sequence[PlannedTensor], num_experts: int) -> str:
    """As llama.cpp's converter writes it: experts times the size of the model with one of them."""
    counts = {tensor.name: math.prod(tensor.shape) for tensor in tensors}
    routed = sum(count for name, count in counts.items() if "_exps." in name)
    total = sum(counts.values())
    return str(size_label(total, total - routed, routed // num_experts, num_experts))
