"""Write docs/cli.md from the --help of every command; `--check` only says whether it is up to date."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

PAGE = Path(__file__).with_name("cli.md")
HEAD = """\
# Commands

Every command and option, for who looks one up: made from `--help` by `make docs`; do not edit it.

Stdout is the result, stderr is progress. Exit codes: 0 done, 1 failed, 2 usage or configuration, 3 integrity,
4 resources, 130 interrupted (143 when terminated). `FACTORCTL_DEBUG=1` adds the traceback to an error;
`FACTORCTL_CACHE` moves the cache; `FACTORCTL_LOAD_PLUGINS` chooses whose strategies are loaded; `FACTORCTL_KERNEL=off`
computes with torch alone; `CXX` is the compiler of the CPU kernel.
"""


def command_names() -> list[str]:
    """The commands in the order of `factorctl --help`."""
    from factorctl.cli.app import app

    return [str(command.name) for command in app.registered_commands]


def help_of(command: str | None) -> str:
    """What `factorctl COMMAND --help` prints at a width of 100."""
    from typer.testing import CliRunner

    from factorctl.cli.app import app

    arguments = [*([command] if command else []), "--help"]
    result = CliRunner().invoke(app, arguments, prog_name="factorctl", terminal_width=100, max_content_width=100)
    if result.exit_code:
        raise RuntimeError(result.output)
    return "\n".join(line.rstrip() for line in result.output.strip().splitlines())


def render() -> str:
    """The page."""
    return "\n".join([HEAD, *_sections()])


def _sections() -> Iterator[str]:
    yield f"```text\n{help_of(None)}\n```\n"
    for name in command_names():
        yield f"## factorctl {name}\n\n```text\n{help_of(name)}\n```\n"


def main() -> int:
    os.environ.pop("COLUMNS", None)
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(render(), encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == render():
        return 0
    sys.stderr.write(f"{PAGE.name} is not what --help says: run `make docs`\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
