"""factorctl: turn a dense Llama-family language model into a sparse Mixture-of-Experts."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from factorctl.models.loading import load as load

try:
    __version__ = version("factorctl")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> object:
    # torch and transformers take seconds to import: `factorctl --help` must not pay for them.
    if name == "load":
        from factorctl.models.loading import load

        return load
    raise AttributeError(f"module 'factorctl' has no attribute '{name}'")
