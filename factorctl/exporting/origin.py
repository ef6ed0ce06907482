"""What a dense source is called and under which licence it comes, as far as its own files say."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_LICENCE_TEXTS = {
    "apache-2.0": re.compile(r"apache license,?\s+version 2\.0", re.IGNORECASE),
    "mit": re.compile(r"^\s*(the )?mit license", re.IGNORECASE),
}
"""Identifier -> how the text of that licence begins."""
_LICENCE_CHARACTERS = 400


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


def licence_of(source: Mapping[str, Any], config: Mapping[str, Any], licences: Sequence[Path]) -> str | None:
    """The licence as the source's card or config.json names it, or as its text begins; None where nothing says it.

    Args:
        source: the manifest's account of the dense model.
        config: the dense model's config.json.
        licences: licence files that travel with the export.
    """
    named = (source.get("card") or {}).get("license")
    if isinstance(named, str):
        return named
    if isinstance(config.get("license"), str):
        return str(config["license"])
    for path in licences:
        text = path.read_text(encoding="utf-8", errors="replace")[:_LICENCE_CHARACTERS]
        found = [name for name, pattern in _LICENCE_TEXTS.items() if pattern.search(" ".join(text.split()))]
        if found:
            return found[0]
    return None
