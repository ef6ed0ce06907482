"""Two writers, places that cannot be written, names that no one expects, clocks that jump."""

from __future__ import annotations

import ctypes
import os
import shutil
import time
from pathlib import Path

import pytest
from bench import Bench
from faults.tally import Tally
from injection import Tear
from standins import OUT
from support.command_line import cli
from support.tiny import leftovers
from verbs import HERE, each_row

from factorctl.checkpoint.manifest import MANIFEST_NAME, is_artefact, read_manifest
from factorctl.errors import ExitCode, UsageError
from factorctl.pipeline.common.workspace import newest_checkpoint

YEAR = 365 * 24 * 3600


INSIDE = ("open runs/.out.partial", "open runs/out.training", "open runs/out/")
"""Writes of a run that holds its output."""


@each_row()
def test_two_writers_of_one_output(name: str, bench: Bench, tmp_path: Path, tally: Tally) -> None:
    """While one is in the middle of its work the other is refused, and the first ends as if it had been alone."""
    if name == "demo":
        pytest.skip("the second waits until the text is written, as for every cache")
    place = bench.place(name, tmp_path / "place")
    points = bench.points(name)
    until = points.index("rename runs/out") if "rename runs/out" in points else len(points)
    inside = [n for n in range(until) if points[n].startswith(INSIDE) and not points[n].endswith(".lock")]

    def meanwhile(number: int, tear: Tear) -> None:
        if number in (inside[0], inside[-1]):
            second = place.run()
            assert second.code == ExitCode.USAGE, second.message
            assert "is being written by process " in second.message
            assert "wait for it, or choose another --out" in second.message

    with tally.case("two writers of one output", name):
        first = place.run(meanwhile)
        assert first.code == ExitCode.DONE, first.message
        place.assert_nothing_lost()
        assert place.result() == place.wanted
        assert leftovers(place.out) == []


CAPABILITIES_VERSION = 0x20080522
MAY_OVERRIDE = 1 << 1 | 1 << 2
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH: root's licence to ignore permissions."""


def obey_permissions() -> None:
    """Give up root's licence, for this process; who is not root has none."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = (ctypes.c_uint32 * 2)(CAPABILITIES_VERSION, 0), (ctypes.c_uint32 * 6)()
    libc.capget(header, data)
    data[0] &= ~MAY_OVERRIDE
    libc.capset(header, data)


@pytest.mark.parametrize("what", ["the directory of the output", "the workspace's parent", "the cache"])
@each_row()
def test_a_directory_that_cannot_be_written(name: str, what: str, bench: Bench, tmp_path: Path, tally: Tally) -> None:
    place = bench.place(name, tmp_path / "place")
    closed = {"the directory of the output": place.out.parent, "the cache": place.root / "cache"}.get(what, place.root)
    if closed == place.root:
        place.out.parent.rmdir()
    closed.mkdir(exist_ok=True)
    closed.chmod(0o555)
    uses_it = what != "the cache" or any("cache/" in point for point in bench.points(name))
    with tally.case("read-only directory", name):
        fate = place.run(prepare=obey_permissions)
        closed.chmod(0o755)
        assert fate.code == (ExitCode.RESOURCES if uses_it else ExitCode.DONE), fate.message
        if uses_it:
            assert "cannot be written: Permission denied" in fate.message
            assert "hint: " in fate.message
            place.out.parent.mkdir(exist_ok=True)
        place.assert_nothing_lost()
        place.assert_finished()


NAMES = {
    "spaces": "my first model  ",
    "unicode": "Größe 模型 🦙",
    "not normalised": "e\u0301\u00e9",
    "a quote and a dollar": "it's $HOME `id` %s {x} [bold]",
    "dashes": "--out",
    "dots": "x..y..",
    "a pattern": "run[0-9]*?",
    "a newline": "one\ntwo",
    "200 bytes": "n" * 200,
}


@pytest.mark.parametrize("kind", NAMES)
def test_unusual_names(kind: str, bench: Bench, tmp_path: Path, every_fault: bool, tally: Tally) -> None:
    """Of the output and of its workspace: the same bytes as under a plain name."""
    turn = list(NAMES).index(kind)
    for index, name in enumerate(HERE):
        if not (every_fault or name in ("factorize", "export hf", "export gguf") or index % len(NAMES) == turn):
            continue
        root = tmp_path / f"{index}" / NAMES[kind]
        out = root / "runs" / NAMES[kind] / (OUT if name == "demo" else NAMES[kind])
        place = bench.place(name, root, out=out)
        with tally.case("unusual path", name):
            fate = place.run()
            assert fate.code == ExitCode.DONE, fate.message
            assert place.result() == place.wanted
            for manifest in out.rglob(MANIFEST_NAME):
                verified = cli("verify", manifest.parent)
                assert verified.code == ExitCode.DONE, verified.message
            if is_artefact(out):
                assert newest_checkpoint(out.parent, kind=read_manifest(out).kind) == out


BESIDE = "x" * 245
TOO_LONG = ("x" * 256, "é" * 128, BESIDE, "/".join(["deep"] * 1200))


@pytest.mark.parametrize("long", TOO_LONG, ids=["a name", "in bytes", "for what lies beside it", "a path"])
@each_row()
def test_names_that_no_file_system_takes(name: str, long: str, bench: Bench, tmp_path: Path, tally: Tally) -> None:
    if name == "demo":
        pytest.skip("its name is its own")
    if name == "try" and long == BESIDE:
        pytest.skip("its report lies inside of that directory, and nothing beside")
    runs = tmp_path / "place" / "runs"
    place = bench.place(name, runs.parent, out=runs / long)
    with tally.case("path too long", name):
        fate = place.run()
        assert fate.code == ExitCode.USAGE, fate.message
        assert "is too long" in fate.message
        assert "choose a shorter name" in fate.message
        assert not list(runs.iterdir())


@pytest.mark.parametrize("long", TOO_LONG, ids=["a name", "in bytes", "for what lies beside it", "a path"])
@pytest.mark.parametrize("verb", ["verify", "inspect", "finetune", "export", "profile"])
def test_checkpoints_under_names_that_no_file_system_takes(verb: str, long: str, tmp_path: Path, tally: Tally) -> None:
    with tally.case("path too long", verb):
        outcome = cli(verb, tmp_path / long)
        assert outcome.code == ExitCode.USAGE, outcome
        assert "does not exist" in outcome.message or "too long" in outcome.message


def test_bytes_that_are_no_text_in_a_path(bench: Bench, tmp_path: Path, tally: Tally) -> None:
    """A manifest records where a local source lies, in JSON, which such a name cannot enter."""
    strange = Path(os.fsdecode(bytes(tmp_path / "dir-") + b"\xff\xfe"))
    shutil.copytree(bench.source, strange)
    with tally.case("unusual path", "not UTF-8"):
        outcome = cli("factorize", strange, "--experts", 4, "--router", "random", "--out", tmp_path / "out")
        assert outcome.code == ExitCode.USAGE, outcome
        assert "is no UTF-8" in outcome.message
        assert "rename" in outcome.message
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("jump", [-YEAR, YEAR], ids=["back", "ahead"])
@each_row()
def test_a_clock_that_jumps_in_the_middle(name: str, jump: int, bench: Bench, tmp_path: Path, tally: Tally) -> None:
    place = bench.place(name, tmp_path / "place")
    genuine = time.time

    def meanwhile(number: int, tear: Tear) -> None:
        time.time = lambda: genuine() + (jump if number % 7 > 3 else 0)

    with tally.case("clock jumps", name):
        fate = place.run(meanwhile)
        assert fate.code == ExitCode.DONE, fate.message
        assert place.result() == place.wanted
        place.assert_nothing_lost()


def test_the_newest_checkpoint_is_not_guessed_from_a_clock_that_was_wrong(
    bench: Bench, tmp_path: Path, tally: Tally
) -> None:
    """Of two checkpoints one is dated in the future: which is newer cannot be told, and is not."""
    first, second = (Path(shutil.copytree(bench.base, tmp_path / name)) for name in ("first", "second"))
    with tally.case("clock jumps", "newest checkpoint"):
        os.utime(first / "factorctl.json", (1e9, 1e9))
        assert newest_checkpoint(tmp_path) == second
        os.utime(first / "factorctl.json", (time.time() + YEAR,) * 2)
        with pytest.raises(UsageError, match=r"first is dated .* in the future") as refused:
            newest_checkpoint(tmp_path)
        assert "name the checkpoint" in str(refused.value)
        shutil.rmtree(second)
        assert newest_checkpoint(tmp_path) == first, "the only one is the newest"
