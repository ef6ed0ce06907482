"""The only importer of rich: tables and JSON on stdout, progress and remarks on stderr."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table as Table
from rich.text import Text

from factorctl.cli.options import OutputFormat
from factorctl.errors import FactorctlError
from factorctl.progress import Progress as ProgressListener
from factorctl.progress import SilentProgress, Task

if TYPE_CHECKING:
    from factorctl.reporting.tables import ReportTable


def stdout() -> Console:
    return Console(file=sys.stdout, soft_wrap=not sys.stdout.isatty())


def stderr() -> Console:
    return Console(file=sys.stderr)


class RichProgress:
    """Draws stages as bars on stderr; where stderr is no terminal, one line per finished stage."""

    def __init__(self) -> None:
        self._console = stderr()
        self._bars: Progress | None = None
        self._depth = 0
        self._noted: set[str] = set()

    @contextmanager
    def stage(self, title: str, total: int | None = None, unit: str = "") -> Iterator[Task]:
        if self._bars is None:
            self._bars = _Bars(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[unit]}"),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bars.start()
        self._depth += 1
        bar = self._bars.add_task(escape(title), total=total, unit=unit, extra="")
        try:
            yield _Bar(self._bars, bar)
            self._bars.update(bar, total=total or 1, completed=total or 1)
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._bars.stop()
                self._bars = None

    def note(self, message: str) -> None:
        """Print it, once: what holds for several models is not told again for each."""
        if message in self._noted:
            return
        self._noted.add(message)
        self._console.print(f"[dim]note:[/dim] {escape(message)}", highlight=False, soft_wrap=True)


class _Bars(Progress):
    """Bars, and below them what each stage says of itself: beside the bar it would push out the remaining time."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        for task in self.tasks:
            if task.fields["extra"]:
                yield Padding(Text(task.fields["extra"]), (0, 0, 0, 2))


class _Bar:
    def __init__(self, bars: Progress, task: TaskID) -> None:
        self._bars, self._task = bars, task

    def advance(self, amount: int = 1, **fields: object) -> None:
        self._bars.advance(self._task, amount)
        if fields:
            self._bars.update(self._task, extra="  ".join(f"{key} {_short(value)}" for key, value in fields.items()))


class SideBySide:
    """Two texts in columns that grow while they are written, on a terminal.

    Nothing is drawn by a thread of its own: that would take time from the model that is being timed.
    """

    SECONDS_BETWEEN_FRAMES = 0.1

    def __init__(self) -> None:
        self._live: Live | None = None

    def open(self, heading: str, *titles: str) -> None:
        """Begin a pair of texts below a heading."""
        self._titles, self._notes, self._texts = list(titles), [""] * len(titles), [""] * len(titles)
        console = stdout()
        console.print(Text(f"> {heading}", style="bold"))
        self._live = Live(console=console, auto_refresh=False, vertical_overflow="ellipsis")
        self._live.start()
        self._draw()

    def write(self, column: int, piece: str) -> None:
        self._texts[column] += piece
        if time.monotonic() - self._drawn >= self.SECONDS_BETWEEN_FRAMES:
            self._draw()

    def finish(self, column: int, note: str) -> None:
        """That text is whole; `note` stands below it."""
        self._notes[column] = note
        self._draw()

    def close(self, lines: Sequence[str]) -> None:
        """Leave both texts on the screen, and what is to be said of them."""
        self.stop()
        for line in (*lines, ""):
            stdout().print(Text(line))

    def stop(self) -> None:
        """Give the terminal back its cursor, whatever came between."""
        if self._live is not None:
            self._live.stop()

    def _draw(self) -> None:
        table = Table(expand=True, show_footer=any(self._notes))
        for title, note in zip(self._titles, self._notes, strict=True):
            table.add_column(Text(title), Text(note, style="dim"), ratio=1, overflow="fold")
        table.add_row(*(Text(text.strip()) for text in self._texts))
        if self._live is not None:
            self._live.update(table, refresh=True)
        self._drawn = time.monotonic()


def ask(question: str) -> str | None:
    """A line that is typed at a terminal; None at its end. The question goes to stderr: stdout is the result."""
    try:
        return stderr().input(question, markup=False)
    except EOFError:
        stderr().print()
        return None


def progress_listener(*, quiet: bool) -> ProgressListener:
    return SilentProgress() if quiet else RichProgress()


def show(result: Any, *, output: OutputFormat, tables: Sequence[Table] = (), closing: Sequence[str] = ()) -> None:
    """Print a result dataclass (or mapping) as one JSON object, or its tables followed by closing lines."""
    if output == "json":
        value = (
            dataclasses.asdict(result) if dataclasses.is_dataclass(result) and not isinstance(result, type) else result
        )
        sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")
        return
    console = stdout()
    for table in tables:
        console.print(table)
    for line in closing:
        console.print(line, highlight=False)


def show_plan(plan: Mapping[str, object], words: Mapping[str, object], *, output: OutputFormat) -> None:
    """What `--dry-run` found: `plan` as JSON, or the same in `words`."""
    show(plan, output=output, tables=[facts_table("Plan (nothing is written)", words)])


def facts_table(title: str, facts: Mapping[str, object]) -> Table:
    """Two columns: what, and its value."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(escape(name), escape(_short(value)))
    return table


def rows_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A table with a header; numbers are right-aligned."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], (int, float)) or row[index] is None for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(_short(value)) for value in row))
    return table


def report_table(table: ReportTable) -> Table:
    """A report's table, as its page and card draw it: what follows the first column is right-aligned."""
    drawn = Table(title=escape(table.title), title_justify="left")
    for index, column in enumerate(table.columns):
        drawn.add_column(column, justify="right" if index else "left", overflow="fold")
    for index, row in enumerate(table.rows):
        drawn.add_row(*map(escape, row), style="red" if index in table.marked else None)
    return drawn


def show_error(error: FactorctlError) -> None:
    console = stderr()
    console.print(f"[bold red]error:[/bold red] {escape(error.message)}", highlight=False, soft_wrap=True)
    if error.hint:
        console.print(f"[bold]hint:[/bold] {escape(error.hint)}", highlight=False, soft_wrap=True)


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def _short(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)
