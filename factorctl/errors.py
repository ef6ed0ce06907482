"""The one exception that users see: what went wrong, which value, and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from enum import IntEnum


class ExitCode(IntEnum):
    """Process exit codes of every command."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    INTEGRITY = 3
    RESOURCES = 4
    INTERRUPTED = 130


class FactorctlError(Exception):
    """An error that the user can act on. Anything else that escapes is a bug and keeps its traceback.

    Args:
        message: what happened, naming the value at fault.
        hint: the next command or value to try.
        exit_code: the process exit code that the command line returns.
    """

    exit_code: ExitCode = ExitCode.FAILED

    def __init__(self, message: str, hint: str | None = None, exit_code: ExitCode | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if exit_code is not None:
            self.exit_code = exit_code

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nHint: {self.hint}"


class UsageError(FactorctlError):
    """A wrong option, value or combination: nothing was read or written."""

    exit_code = ExitCode.USAGE
    faults: tuple[UsageError, ...] = ()
    """What it tells together, one by one; none where it is one itself."""


def together(faults: Sequence[UsageError]) -> UsageError:
    """One error that tells all of them, each once; a single one stays as it is."""
    every = {str(single): single for fault in faults for single in fault.faults or (fault,)}
    if len(every) == 1:
        return next(iter(every.values()))
    lines = [fault.message + (f" ({fault.hint})" if fault.hint else "") for fault in every.values()]
    error = UsageError("\n  ".join([f"{len(every)} things are wrong:", *lines]))
    error.faults = tuple(every.values())
    return error


class IntegrityError(FactorctlError):
    """Bytes on disk are not what their manifest, index or header promises."""

    exit_code = ExitCode.INTEGRITY


class ResourceError(FactorctlError):
    """Not enough memory, disk or device for the work that was asked for."""

    exit_code = ExitCode.RESOURCES


def in_one_line(error: BaseException) -> str:
    """What another library's error says, short enough to quote in ours."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def first_cause(error: BaseException) -> BaseException:
    """What an error goes back to: libraries wrap the one that says what happened into several that explain it."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return error


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The hint for an unknown name: the closest known one first, then all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1)
    listing = ", ".join(names) if names else "none are installed"
    return f"did you mean '{close[0]}'? Known: {listing}" if close else f"known: {listing}"
