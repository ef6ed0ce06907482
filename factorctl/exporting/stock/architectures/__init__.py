"""The stock architectures that exports take: a file each, in which `ARCHITECTURE` says all there is to know of it.

A file that is added here is found: its name is an `--arch`, and what its fields say decides the rest.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from factorctl.exporting.stock.architecture import Architecture


def architectures() -> tuple[Architecture, ...]:
    """All of them, those first that more engines load."""
    files = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    found: list[Architecture] = [file.ARCHITECTURE for file in files]
    return tuple(sorted(found, key=lambda row: (-len(row.engines), row.option)))
