"""`factorctl plugins`: whose strategies are there."""

from __future__ import annotations

from dataclasses import dataclass

from factorctl.checkpoint.aliases import ALIASES
from factorctl.partitions import StrategyInfo, available


@dataclass(frozen=True)
class Plugins:
    """What can be chosen by name."""

    strategies: list[StrategyInfo]
    aliases: dict[str, str]
    """Short name of a model -> what it stands for."""


def list_plugins() -> Plugins:
    """Every installed strategy, broken ones with their fault, and the model aliases."""
    return Plugins(available(), dict(ALIASES))
