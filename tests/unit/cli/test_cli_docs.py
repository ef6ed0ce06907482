"""docs/cli.md is what the commands' --help says, and every command and option explains itself."""

from __future__ import annotations

import importlib.util
import re
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from factorctl.cli.app import app

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def renderer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("render_cli", ROOT / "docs" / "render_cli.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(renderer: ModuleType) -> None:
    pinned = re.search(r"^typer==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    if pinned is None or version("typer") != pinned[1]:
        pytest.skip("another typer than the pinned one words its help differently")
    assert (ROOT / "docs" / "cli.md").read_text() == renderer.render(), "run `make docs`"


def test_every_command_and_option_has_help(renderer: ModuleType) -> None:
    for name in renderer.command_names():
        help_text = renderer.help_of(name)
        about = help_text.splitlines()[2].strip()
        assert about, name
        assert about[0].isupper(), f"{name}: {about}"
        for line in re.findall(r"^  (?:-\w, )?(--[\w-]+(?: <[^>]+>)?) *$(?!\n {4,})", help_text, re.MULTILINE):
            pytest.fail(f"factorctl {name} {line} has no help")


def test_the_list_of_commands_says_whole_sentences(renderer: ModuleType) -> None:
    listed = CliRunner().invoke(app, ["--help"], terminal_width=80).stdout.partition("Commands:\n")[2]
    lines = listed.strip().splitlines()
    assert [line.split()[0] for line in lines] == renderer.command_names()
    for line in lines:
        assert re.search(r"[^.]\.$", line), line
