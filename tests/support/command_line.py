"""Running the real command line: the same entry point, exit code, stdout and stderr, mostly without the imports."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import typer

from factorctl.cli.app import main
from factorctl.cli.command import command
from factorctl.pipeline.recipe.read import STAGES


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.stdout)
        return value

    @property
    def message(self) -> str:
        """stderr on one line."""
        return " ".join(self.stderr.split())


def cli(*arguments: object) -> Outcome:
    """`factorctl ARGUMENTS` through `main`, in this process."""
    before, out, err = signal.getsignal(signal.SIGTERM), io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["factorctl", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            signal.signal(signal.SIGTERM, before)
    return Outcome(code, out.getvalue(), err.getvalue())


def config_of(line: str, config: type | None = None) -> Any:
    """The config that `factorctl VERB ...` means; nothing is run.

    Args:
        config: takes the place of the verb's own.

    Raises:
        UsageError: a value does not exist, and click's own error where an option does not.
    """
    program, verb, *arguments = shlex.split(line)
    assert program == "factorctl"
    made: list[Any] = []

    def body(read: Any, _: object) -> None:
        made.append(read)

    app = typer.Typer()
    app.command()(command(config or STAGES[verb], body))  # type: ignore[index]
    typer.main.get_command(app).main(arguments, standalone_mode=False)
    return made[0]


def cli_process(*arguments: object, prelude: str = "", **environment: str) -> subprocess.Popen[str]:
    """The same in a process of its own; `prelude` is Python that runs before `main`."""
    script = f"{prelude}\nfrom factorctl.cli.app import main\nmain()\n"
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> Outcome:
    out, err = process.communicate(timeout=240)
    return Outcome(process.returncode, out, err)
