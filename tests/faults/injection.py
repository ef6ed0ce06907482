"""Forked children that die, starve or are interrupted at a chosen write.

Python reports every call that opens, renames or removes a file to its audit hooks before the call is made, whoever
makes it; writes and fsyncs are caught by wrapping. Each is a *write point*, numbered in the order of the run. The
child that reaches its point dies by SIGKILL (no handler, no `finally` and no buffer softens the blow), is refused by
the system, or gets a signal. A write is torn: its first half reaches the disk.

A fork of a process that has imported everything costs milliseconds, so that every point can have its own run.
"""

from __future__ import annotations

import builtins
import contextlib
import gc
import io
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.command_line import Outcome

from factorctl.files import publishing

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
"""Flags of an open that may change the file."""
Tear = Callable[[], None]
"""Puts the first half of a write on the disk; nothing for other calls."""
Action = Callable[[int, Tear], None]
"""What happens ahead of write point number n."""


@dataclass(frozen=True)
class Fate:
    """How a child ended."""

    status: int
    """Exit status of the process, or minus the signal that ended it."""
    outcome: Outcome | None = None
    """What the command printed and returned; None where the child was killed."""
    points: tuple[str, ...] = ()
    """The write points that it passed, e.g. 'fsync .out.partial'."""
    crash: str = ""
    """Traceback of an exception that no user should ever see."""

    @property
    def code(self) -> int:
        """The command's exit code."""
        assert not self.crash, self.crash
        assert self.outcome is not None, f"the child ended with status {self.status}"
        return self.outcome.code

    @property
    def message(self) -> str:
        """stderr on one line."""
        assert self.outcome is not None
        return self.outcome.message


def forked(work: Callable[[], dict[str, Any]]) -> tuple[int, dict[str, Any]]:
    """Run `work` in a child; (exit status or minus the signal, what it returned or {} where it was killed)."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        pipe = os.fdopen(writing, "w", encoding="utf-8")
        with contextlib.suppress(BaseException):
            try:
                result = work()
            except BaseException:
                result = {"crash": traceback.format_exc()}
            pipe.write(json.dumps(result))
            pipe.flush()
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as pipe:
        answer = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, json.loads(answer) if answer else {}


def fate_of(run: Callable[[], Outcome], root: Path, action: Action | None = None) -> Fate:
    """Run a command in a child that counts its write points below `root` and does `action` ahead of each."""

    def work() -> dict[str, Any]:
        gc.disable()  # it would touch, and so copy, every page that the child shares with its parent
        points = WritePoints(root, action)
        points.install()
        try:
            outcome = run()
        except BaseException:
            return {"crash": traceback.format_exc(), "points": points.names}
        return {"outcome": [outcome.code, outcome.stdout, outcome.stderr], "points": points.names}

    status, answer = forked(work)
    return Fate(
        status,
        outcome=Outcome(*answer["outcome"]) if "outcome" in answer else None,
        points=tuple(answer.get("points", ())),
        crash=answer.get("crash", ""),
    )


class WritePoints:
    """Numbers the calls that change what lies below `root`. `install` cannot be undone: for children only."""

    def __init__(self, root: Path, action: Action | None) -> None:
        self.root, self.action = f"{root.resolve()}{os.sep}", action
        self.names: list[str] = []
        self._busy = False

    def install(self) -> None:
        sys.addaudithook(self._audit)
        builtins.open = io.open = self._counted_open(io.open)  # type: ignore[assignment]
        os.fsync = self._ahead_of("fsync", os.fsync, lambda handle: os.readlink(f"/proc/self/fd/{handle}"))
        os.pwrite = self._ahead_of("write", os.pwrite, lambda handle: os.readlink(f"/proc/self/fd/{handle}"))
        publishing._swap = self._ahead_of("swap", publishing._swap, str)

    def reached(self, call: str, path: str, tear: Tear = lambda: None) -> None:
        """One more write point, if `path` lies below the root."""
        path = os.path.abspath(path)
        if self._busy or not path.startswith(self.root):
            return
        self._busy = True
        try:
            self.names.append(f"{call} {path.removeprefix(self.root)}")
            if self.action is not None:
                self.action(len(self.names) - 1, tear)
        finally:
            self._busy = False

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & WRITING and isinstance(path, (str, bytes, os.PathLike)):
                self.reached("open", os.fsdecode(path))
        elif event in ("os.mkdir", "os.remove", "os.rmdir"):
            self.reached(event.removeprefix("os."), _located(arguments[0], arguments[-1]))
        elif event == "os.rename":
            self.reached("rename", _located(arguments[1], arguments[3]))
        elif event == "os.truncate" and isinstance(arguments[0], int):
            self.reached("truncate", os.readlink(f"/proc/self/fd/{arguments[0]}"))

    def _ahead_of(self, call: str, function: Callable[..., Any], locate: Callable[[Any], str]) -> Callable[..., Any]:
        def counted(first: Any, *others: Any) -> Any:
            self.reached(call, locate(first))
            return function(first, *others)

        return counted

    def _counted_open(self, genuine: Callable[..., Any]) -> Callable[..., Any]:
        def counted(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            stream = genuine(file, mode, *arguments, **options)
            if isinstance(file, int) or not set(mode) & set("wax+"):
                return stream
            path = os.path.abspath(os.fsdecode(file))
            return TornFile(stream, self, path) if path.startswith(self.root) else stream

        return counted


class TornFile:
    """An open file whose writes are write points."""

    def __init__(self, stream: Any, points: WritePoints, path: str) -> None:
        self._stream, self._points, self._path = stream, points, path

    def write(self, data: Any) -> Any:
        def tear() -> None:
            self._stream.write(data[: len(data) // 2])
            self._stream.flush()

        self._points.reached("write", self._path, tear)
        return self._stream.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> TornFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._stream)


def _located(path: Any, directory: int) -> str:
    """An absolute path; `directory` is an open directory that it is relative to, or -1."""
    name = os.fsdecode(path)
    return name if directory == -1 else os.path.join(os.readlink(f"/proc/self/fd/{directory}"), name)


def die_at(point: int) -> Action:
    """SIGKILL."""

    def act(number: int, tear: Tear) -> None:
        if number == point:
            tear()
            os.kill(os.getpid(), signal.SIGKILL)

    return act


def refused_at(point: int, failure: int) -> Action:
    """The system refuses this one call."""

    def act(number: int, tear: Tear) -> None:
        if number == point:
            tear()
            raise OSError(failure, os.strerror(failure))

    return act


def signalled_at(point: int, *sent: signal.Signals) -> Action:
    """Signals arrive; Python runs their handlers at once."""

    def act(number: int, tear: Tear) -> None:
        if number == point:
            for one in sent:
                os.kill(os.getpid(), one)

    return act
