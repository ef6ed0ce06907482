"""Where factorctl keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """Of fetched wheels, dequantised models, token blocks, tuned ladders and kernels: $FACTORCTL_CACHE or
    ~/.cache/factorctl.
    """
    return Path(os.environ.get("FACTORCTL_CACHE") or Path.home() / ".cache" / "factorctl")
