"""What ran: the versions of the libraries, for manifests and reports."""

from __future__ import annotations

import functools
from importlib.metadata import PackageNotFoundError, version

LIBRARIES = ("torch", "transformers", "safetensors", "numpy", "accelerate")


def library_versions() -> dict[str, str]:
    """Version of each library that decides numbers or bytes."""
    return {name: found for name in LIBRARIES if (found := _version(name)) is not None}


@functools.cache
def _version(name: str) -> str | None:
    """None where it is not installed; looking takes milliseconds, and every part of an evaluation asks."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
