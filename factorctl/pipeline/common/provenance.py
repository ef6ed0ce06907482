"""What ran: versions and memory, for manifests and reports."""

from __future__ import annotations

import functools
import resource
import sys
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


def peak_rss_bytes() -> int:
    """Largest resident size of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
