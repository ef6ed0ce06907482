"""What ran: versions and memory, for manifests and reports."""

from __future__ import annotations

import resource
import sys
from importlib.metadata import PackageNotFoundError, version

LIBRARIES = ("torch", "transformers", "safetensors", "numpy", "accelerate")


def library_versions() -> dict[str, str]:
    """Version of each library that decides numbers or bytes."""
    return {name: version(name) for name in LIBRARIES if _installed(name)}


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def peak_rss_bytes() -> int:
    """Largest resident size of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
