"""What was taken of a source and what was passed over: said once while it is read, and recorded beside its hashes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from factorctl.data.row_filter import RowFilter
from factorctl.data.spec import DataSpec, FileSource, SelfSource
from factorctl.progress import Progress


@dataclass
class SourceAccount:
    """One source's fields and omissions."""

    source: str
    """Name of the source as the user wrote it."""
    progress: Progress
    rows: RowFilter | None = None
    """Which rows are read; None means all."""
    taken: list[str] = field(default_factory=list)
    """What was read as text."""
    omitted: Counter[str] = field(default_factory=Counter)
    """Why rows were passed over -> how many."""
    first: dict[str, str] = field(default_factory=dict)
    """Why rows were passed over -> where that was met first."""
    met: Counter[str] = field(default_factory=Counter)
    """Values of the filter's field -> rows read so far that have them."""

    def take(self, what: str, where: str | None = None) -> None:
        """Say, once per source, that `what` is read as text ("field 'text'"); where, if something else was before."""
        if what not in self.taken:
            self.taken.append(what)
            self.progress.note(_taken_note(self.source, what, None if len(self.taken) == 1 else where))

    def omit(self, why: str, where: str) -> None:
        """Count a row that is passed over, for `close` to say."""
        self.omitted[why] += 1
        self.first.setdefault(why, where)

    def admits(self, row: Mapping[str, object], identity: str, where: str) -> bool:
        """Whether the filter lets a row be read; what it does not is counted.

        Raises:
            UsageError: the row lacks the filter's field.
        """
        if self.rows is None:
            return True
        value = self.rows.value_in(row, where)
        if value is not None:
            self.met[value] += 1
        if admitted := self.rows.admits(value):
            return admitted
        self.omit(f"not {self.rows}", identity)
        return False

    def close(self) -> None:
        """Say what was passed over, and which values of the filter no row has: they may be misspelt."""
        for why, count in self.omitted.items():
            self.progress.note(_omitted_note(self.source, why, count, self.first[why]))
        if self.rows is None:
            return
        for value in self.rows.values:
            if value not in self.met:
                found = _listed(repr(name) for name, _ in self.met.most_common())
                self.progress.note(f"'{self.source}': no row read has {self.rows.field} {value!r}; found: {found}")

    @property
    def record(self) -> dict[str, Any]:
        """The account as JSON, without absolute paths: it stands in manifests. Plain text and `self` have none."""
        omitted = [{"why": why, "rows": rows} for why, rows in self.omitted.items()]
        return ({"text": list(self.taken)} if self.taken else {}) | ({"passed_over": omitted} if omitted else {})


def open_accounts(spec: DataSpec, progress: Progress) -> dict[str, SourceAccount]:
    """An account for each source, by its name; what a folder leaves out is said at once."""
    say_splits(spec, progress)
    return {
        source.name: SourceAccount(source.name, progress, None if isinstance(source, SelfSource) else source.rows)
        for source in spec.sources
    }


def say_splits(spec: DataSpec, progress: Progress) -> None:
    """Say which files of a folder are left out as test or validation splits, or are read although named so."""
    for source in spec.sources:
        if not isinstance(source, FileSource):
            continue
        if source.left_out:
            progress.note(
                f"'{source.name}': its training split is read; left out: {_listed(source.left_out)} "
                "(name a file to read it)"
            )
        if source.odd_splits:
            progress.note(
                f"'{source.name}': read although named as a test or validation split: {_listed(source.odd_splits)}"
            )


def say_record(source: Mapping[str, Any], progress: Progress) -> None:
    """Say of cached text what was said when it was read."""
    for what in source.get("text", []):
        progress.note(_taken_note(source["name"], what, None))
    for omitted in source.get("passed_over", []):
        progress.note(_omitted_note(source["name"], omitted["why"], omitted["rows"], None))


def _taken_note(source: str, what: str, where: str | None) -> str:
    return f"'{source}': read as text: {what}" + (f" (from {where} on)" if where else "")


def _omitted_note(source: str, why: str, count: int, where: str | None) -> str:
    rows = "1 row was" if count == 1 else f"{count:,} rows were"
    return f"'{source}': {rows} passed over: {why}" + (f" (first: {where})" if where else "")


def _listed(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")
