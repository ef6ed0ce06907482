"""What a model's own files say of its licence and its origin, for the cards of what is made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from factorctl.errors import IntegrityError
from factorctl.files.strict_json import read_json_object

CARD_FIELDS = ("license", "license_name", "license_link", "language", "base_model")
"""What is taken from the front matter of a README.md, all of them text or lists of text."""


def source_card(directory: Path) -> dict[str, Any]:
    """The fields of CARD_FIELDS that the README.md or, for the licence, the config.json of `directory` states."""
    facts = {key: value for key, value in _front_matter(directory / "README.md").items() if key in CARD_FIELDS}
    if "license" not in facts:
        try:
            named = read_json_object(directory / "config.json").get("license")
        except IntegrityError:
            named = None
        facts |= {"license": named} if named else {}
    return {key: facts[key] for key in CARD_FIELDS if _is_text(facts.get(key))}


def _front_matter(readme: Path) -> dict[str, Any]:
    """The YAML of a model card; nothing where there is no card, or one that nobody can read."""
    from huggingface_hub import metadata_load  # imports much, and only one step of a run asks

    if not readme.is_file():
        return {}
    try:
        found = metadata_load(readme)
    except Exception:  # anybody's file: YAML errors and wrong encodings of many types
        return {}
    return found if isinstance(found, dict) else {}


def _is_text(value: object) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, str) and item for item in value)
    return isinstance(value, str) and bool(value)
