"""Find partition strategies, shipped or third-party, through the entry points that their packages declare.

Nothing is imported until it is asked for. A strategy that does not load is listed with its fault and stops nobody
who does not use it. `FACTORCTL_LOAD_PLUGINS` chooses whose strategies count:

| value | strategies |
|---|---|
| not set | of every installed package |
| empty | shipped with factorctl only |
| `factorctl-dealt,other` | shipped, and of the packages named |
"""

from __future__ import annotations

import os
import re
from collections.abc import Set
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points

from factorctl.contracts import PARTITION_ENTRY_POINTS, PartitionStrategy
from factorctl.errors import FactorctlError, UsageError, did_you_mean

LOAD_PLUGINS_VARIABLE = "FACTORCTL_LOAD_PLUGINS"
SHIPPED_DISTRIBUTION = "factorctl"


@dataclass(frozen=True)
class StrategyInfo:
    """One row of `factorctl plugins`."""

    name: str
    distribution: str
    version: str
    reference: str | None
    """Paper or URL; None when the strategy is broken."""
    options: tuple[str, ...]
    error: str | None
    """Why it cannot be used; None when it can."""


@dataclass(frozen=True)
class StrategyProvenance:
    """Where a strategy came from, as the manifest records it."""

    name: str
    version: str
    reference: str
    distribution: str


class BrokenStrategyError(FactorctlError):
    """An installed strategy does not load, or is no `PartitionStrategy`."""


def available() -> list[StrategyInfo]:
    """Every installed strategy, by name, with the fault of each one that cannot be used.

    Raises:
        UsageError: when FACTORCTL_LOAD_PLUGINS names a package that provides no strategy.
    """
    entries = _switched_on(_installed())
    return [_describe(entry, _providers(entry.name, entries)) for entry in entries]


def get_strategy(name: str) -> tuple[PartitionStrategy, StrategyProvenance]:
    """Load the strategy `name` and no other.

    Raises:
        UsageError: for a name that nobody provides, that is switched off, or that two packages provide.
        BrokenStrategyError: when it does not load, or is no `PartitionStrategy`; names the package and the fault.
    """
    installed = _installed()
    providers = _providers(name, _switched_on(installed))
    if not providers:
        raise _unknown(name, installed)
    if len(providers) > 1:
        raise UsageError(_conflict(name, providers), _conflict_hint())
    strategy = _load(providers[0])
    return strategy, StrategyProvenance(
        name=name,
        version=_version(providers[0]),
        reference=strategy.reference,
        distribution=_distribution(providers[0]),
    )


def contract_faults(strategy: object, name: str) -> list[str]:
    """What keeps `strategy`, registered as `name`, from being a `PartitionStrategy`; empty when nothing does.

    `isinstance` with a Protocol says yes or no, and only looks whether attributes exist.
    """
    faults = []
    claimed = getattr(strategy, "name", None)
    if claimed != name:
        faults.append(f"name is {claimed!r}, but its entry point calls it {name!r}")
    reference = getattr(strategy, "reference", None)
    if not isinstance(reference, str) or not reference.strip():
        faults.append("reference must be a paper or URL")
    options = getattr(strategy, "option_names", None)
    if not isinstance(options, Set) or not all(isinstance(option, str) for option in options):
        faults.append("option_names must be a frozenset of str")
    faults += [
        f"{method}() is missing" for method in ("needs", "partition") if not callable(getattr(strategy, method, None))
    ]
    return faults


def _installed() -> list[EntryPoint]:
    return sorted(entry_points(group=PARTITION_ENTRY_POINTS), key=lambda entry: (entry.name, _distribution(entry)))


def _switched_on(entries: list[EntryPoint]) -> list[EntryPoint]:
    """The entry points whose packages FACTORCTL_LOAD_PLUGINS lets in."""
    value = os.environ.get(LOAD_PLUGINS_VARIABLE)
    if value is None:
        return entries
    wanted = {_normal(word): word.strip() for word in value.split(",") if word.strip()}
    known = {_normal(_distribution(entry)) for entry in entries}
    for normal, word in wanted.items():
        if normal not in known:
            raise UsageError(
                f"{LOAD_PLUGINS_VARIABLE} names '{word}', which provides no strategy", did_you_mean(normal, known)
            )
    allowed = {*wanted, SHIPPED_DISTRIBUTION}
    return [entry for entry in entries if _normal(_distribution(entry)) in allowed]


def _providers(name: str, entries: list[EntryPoint]) -> list[EntryPoint]:
    return [entry for entry in entries if entry.name == name]


def _describe(entry: EntryPoint, providers: list[EntryPoint]) -> StrategyInfo:
    row = StrategyInfo(entry.name, _distribution(entry), _version(entry), reference=None, options=(), error=None)
    if len(providers) > 1:
        return replace(row, error=_conflict(entry.name, providers))
    try:
        strategy = _load(entry)
    except BrokenStrategyError as fault:
        return replace(row, error=fault.message)
    return replace(row, reference=strategy.reference, options=tuple(sorted(strategy.option_names)))


def _load(entry: EntryPoint) -> PartitionStrategy:
    origin = f"strategy '{entry.name}' of {_distribution(entry)} {_version(entry)}"
    hint = f"update or uninstall {_distribution(entry)}; `factorctl plugins` lists the strategies that work"
    try:
        strategy: PartitionStrategy = entry.load()()
    except (Exception, SystemExit) as error:  # foreign code: whatever it raises must not take the others down
        raise BrokenStrategyError(f"{origin} does not load: {type(error).__name__}: {error}", hint) from error
    faults = contract_faults(strategy, entry.name)
    if faults:
        raise BrokenStrategyError(f"{origin} is no partition strategy: {'; '.join(faults)}", hint)
    return strategy


def _unknown(name: str, installed: list[EntryPoint]) -> UsageError:
    switched_off = [_distribution(entry) for entry in _providers(name, installed)]
    if switched_off:
        return UsageError(
            f"strategy '{name}' is switched off by {LOAD_PLUGINS_VARIABLE}",
            f"unset it, or add {' or '.join(switched_off)} to it",
        )
    return UsageError(
        f"no strategy is called '{name}'", did_you_mean(name, {entry.name for entry in _switched_on(installed)})
    )


def _conflict(name: str, providers: list[EntryPoint]) -> str:
    origins = " and ".join(f"{_distribution(entry)} {_version(entry)}" for entry in providers)
    return f"strategy '{name}' is provided by {origins}"


def _conflict_hint() -> str:
    return f"uninstall all but one, or list the packages to load in {LOAD_PLUGINS_VARIABLE} (empty: shipped ones only)"


def _distribution(entry: EntryPoint) -> str:
    return "an unnamed package" if entry.dist is None else str(entry.dist.name)


def _version(entry: EntryPoint) -> str:
    return "unknown" if entry.dist is None else str(entry.dist.version)


def _normal(distribution: str) -> str:
    """PEP 503: My_Plugin, my.plugin and my-plugin are one distribution."""
    return re.sub(r"[-_.]+", "-", distribution.strip()).lower()
