"""What every fault test gets: the bench with its verbs, and a tally of cases that can be written down as a report.

A plugin of tests/conftest.py: a second conftest.py would hide the first from `from conftest import ...`.
"""

from __future__ import annotations

import datetime
import functools
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import pytest

if TYPE_CHECKING:
    from bench import Bench

KEY = "fault cases"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults", "fault injection")
    group.addoption("--fault-report", metavar="FILE", help="write the counts of cases to this Markdown file")
    group.addoption("--every-fault", action="store_true", help="try every write point, not a sample")


@pytest.fixture(scope="session")
def every_fault(pytestconfig: pytest.Config) -> bool:
    """Whether every point is wanted; by default a sample."""
    return bool(pytestconfig.getoption("--every-fault"))


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """The bench; the tree of commands is built once too, not in every child, where it is a third of a tiny run."""
    import typer.main
    from bench import Bench

    with mock.patch.object(typer.main, "get_command", functools.cache(typer.main.get_command)):
        yield Bench(tmp_path_factory.mktemp("bench"))


class Tally:
    """Counts cases: one is tried when it begins and has survived when it ends without a failure."""

    def __init__(self) -> None:
        self.tried: Counter[tuple[str, str]] = Counter()
        self.survived: Counter[tuple[str, str]] = Counter()

    @contextmanager
    def case(self, fault: str, where: str) -> Iterator[None]:
        self.tried[fault, where] += 1
        yield
        self.survived[fault, where] += 1

    def add(self, fault: str, where: str, *, tried: int, survived: int) -> None:
        """Cases that were counted elsewhere, in a child say."""
        self.tried[fault, where] += tried
        self.survived[fault, where] += survived


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    """The counts of one test; they travel with its report, also from another process."""
    counts = Tally()
    yield counts
    rows = [[*key, tried, counts.survived[key]] for key, tried in counts.tried.items()]
    request.node.user_properties.append((KEY, rows))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """A test that is marked `fault(fault, where)` is one case."""
    marker = pyfuncitem.get_closest_marker("fault")
    if marker is None:
        return (yield)
    row: list[object] = [*marker.args, 1, 0]
    pyfuncitem.user_properties.append((KEY, [row]))
    result = yield
    row[-1] = 1
    return result


class Totals:
    """Adds the tallies of all tests up and writes the report when the session ends."""

    def __init__(self, path: Path, arguments: tuple[str, ...]) -> None:
        self.path, self.arguments = path, arguments
        self.tried: Counter[tuple[str, str]] = Counter()
        self.survived: Counter[tuple[str, str]] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "teardown":
            return
        for key, rows in report.user_properties:
            for fault, where, tried, survived in rows if key == KEY else ():  # type: ignore[attr-defined]
                self.tried[fault, where] += tried
                self.survived[fault, where] += survived

    def pytest_sessionfinish(self) -> None:
        from benchmarks import reporting

        with mock.patch("sys.argv", ["-m", "pytest", *self.arguments]):
            head = reporting.header("Faults: cases tried, survived, lost")
        self.path.write_text(f"{head}\n{INTRODUCTION}\n{self.table()}", encoding="utf-8")

    def table(self) -> str:
        lines = ["| fault | where | tried | survived | lost |", "|---|---|---:|---:|---:|"]
        for fault, where in sorted(self.tried):
            lines.append(_row(fault, where, self.tried[fault, where], self.survived[fault, where]))
        lines.append(_row("**all**", "", self.tried.total(), self.survived.total()))
        return "\n".join(lines) + "\n"


def _row(fault: str, where: str, tried: int, survived: int) -> str:
    return f"| {fault} | {where} | {tried:,} | {survived:,} | {tried - survived:,} |"


INTRODUCTION = f"""\
Written by the suite `tests/faults` on {datetime.date.today().isoformat()}. A case has survived when, after the fault,

- the artefact that was read and the one that was to be replaced verify, and no half-written one is taken for whole;
- the message says what happened and what to do, the exit code is the documented one, and there is no traceback;
- the same command, run again, ends with the same bytes as a run that nothing disturbed: of checkpoints and exports
  every byte; of reports all but what they say of the run itself (times, memory, places: tests/faults/comparing.py).

A *write point* is a call that changes the disk (open, write, fsync, rename, swap, remove, mkdir); the run is forked and
stopped ahead of it, and a write is torn in the middle. Hostile files are generated from a fixed seed; none may be
loaded, hang, raise anything but our own error, or make factorctl open a file outside of its directory.
"""


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--fault-report")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Totals(Path(path), tuple(map(str, config.invocation_params.args))))
