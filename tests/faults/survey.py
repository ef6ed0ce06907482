"""Giving hostile files to a reader, case after case, in a child that may neither hang, swell nor look elsewhere."""

from __future__ import annotations

import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hostile import Case
from injection import WRITING, forked

import factorctl
from factorctl.errors import FactorctlError

SECONDS = 20
"""Processor time that one case may take before it counts as hanging; a case takes milliseconds."""
HEADROOM = 3 * 2**30
"""Address space that a case may take on top of what the process has."""
CODE = (str(Path(factorctl.__file__).parents[1]), sys.prefix, sys.base_prefix, "/usr")
READABLE = (*CODE, "/proc", "/sys", "/dev/null", "/dev/urandom")
"""Where code lies that is imported late."""


@dataclass
class Findings:
    """What became of the cases of one reader."""

    tried: int = 0
    refused: int = 0
    taken: int = 0
    """Read without an error: allowed where what was changed has no meaning to the reader."""
    failures: list[str] = field(default_factory=list)


class HangError(BaseException):
    """No `except Exception` catches it."""


def survey(read: Callable[[bytes], object], cases: Iterable[Case], inside: Path | None) -> Findings:
    """Read every case in a forked child.

    Args:
        read: puts the bytes where they belong and reads them; False means that it took no notice of them.
        inside: the only directory whose files may be opened; None where others may be too.
    """

    def work() -> dict[str, Any]:
        _limit_memory()
        opened: list[str] = []
        if inside is not None:
            sys.addaudithook(lambda event, arguments: _watch(event, arguments, inside, opened))
        signal.signal(signal.SIGVTALRM, _hang)
        found = Findings()
        for case in cases:
            found.tried += 1
            if fault := _fault_of(read, case, found, opened):
                found.failures.append(f"{case.what}: {fault}")
        return vars(found)

    status, answer = forked(work)
    assert "crash" not in answer, answer["crash"]
    assert status == 0, f"the reading process ended with {status}"
    return Findings(**answer)


def _fault_of(read: Callable[[bytes], object], case: Case, found: Findings, opened: list[str]) -> str | None:
    """What is wrong with how a case was received; None if nothing is."""
    opened.clear()
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        taken = read(case.content) is not False
    except FactorctlError:
        found.refused += 1
        return f"opened {opened[0]}" if opened else None
    except HangError:
        return f"hangs: {traceback.format_exc()[-600:]}"
    except BaseException:
        return traceback.format_exc()[-1200:]
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    found.taken += taken
    found.refused += not taken
    if taken and case.must_be_refused:
        return "it was read as if nothing were wrong"
    return f"opened {opened[0]}" if opened else None


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + HEADROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _watch(event: str, arguments: tuple[Any, ...], inside: Path, opened: list[str]) -> None:
    if event != "open" or not isinstance(arguments[0], (str, bytes, os.PathLike)):
        return
    path = os.path.abspath(os.fsdecode(arguments[0]))
    if path.startswith(f"{inside}{os.sep}"):
        return
    if arguments[2] & WRITING or not path.startswith(READABLE):
        opened.append(path)


def _hang(*_: object) -> None:
    raise HangError
