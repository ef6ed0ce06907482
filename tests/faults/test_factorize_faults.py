"""`factorize` killed on the way: how much of the work the next run finds finished, and what it trusts of it.

test_write_points.py kills every verb at every write and looks at the bytes; here it is the work that counts.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import DenseSource
from injection import die_at, fate_of, forked
from support.command_line import Outcome, cli, cli_process, finished
from support.tiny import calibrated, directory_bytes, factorize_quietly, leftovers, weights_only

from factorctl.config.factorize import FactorizeConfig
from factorctl.errors import ExitCode
from factorctl.files.publishing import sole_writer
from factorctl.pipeline.factorize.layers import LayerFactory
from factorctl.pipeline.factorize.run import factorize
from factorctl.progress import SilentProgress


def killed(config: FactorizeConfig, before: str) -> None:
    """Run in a child that dies by SIGKILL ahead of the first write point of that name."""

    def run() -> Outcome:
        factorize_quietly(config)
        return Outcome(0, "", "")

    out = config.out
    assert out is not None
    points = fate_of(run, out.parent).points
    shutil.rmtree(out)
    assert fate_of(run, out.parent, die_at(points.index(before))).status == -signal.SIGKILL


def finish(config: FactorizeConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Run again; (shards found finished, layers factored now)."""
    progress, factored = SilentProgress(), []
    original = LayerFactory.factor
    with monkeypatch.context() as patch:
        patch.setattr(LayerFactory, "factor", lambda self, layer: factored.append(layer) or original(self, layer))
        factorize(config, progress)
    notes = [note for note in progress.notes if note.startswith("resuming: ")]
    return (int(notes[0].split()[1]) if notes else 0), len(factored)


CONFIGS: dict[str, Callable[[Path, Path, Path], FactorizeConfig]] = {
    "weights-only": lambda source, out, text: weights_only(source, out, strategy="permuted"),
    "statistics": lambda source, out, text: calibrated(
        source, out, text, strategy="permuted", router="random", scale="sum", refit=False
    ),
}
SHARD = "rename .out.partial/model-0000{}-of-00003.safetensors"
MOMENTS = {
    SHARD.format(1): (0, 2),
    "rename .out.journal.json": (0, 2),
    SHARD.format(2): (1, 2),
    SHARD.format(3): (2, 1),
    "rename .out.partial/config.json": (3, 0),
    "rename out": (3, 0),
}
"""Write point -> (shards that are found finished, layers that are factored again). Shard 1, no layer, comes first."""


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_finished_is_not_done_again(
    kind: str,
    moment: str,
    dense_source: DenseSource,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, straight = (CONFIGS[kind](dense_source(), tmp_path / name / "out", text_file) for name in ("a", "b"))
    factorize_quietly(straight)
    killed(config, moment)
    assert finish(config, monkeypatch) == MOMENTS[moment]
    assert directory_bytes(tmp_path / "a" / "out") == directory_bytes(tmp_path / "b" / "out")
    assert leftovers(tmp_path / "a" / "out") == []


def test_a_second_run_waits_for_the_cache_and_the_lock_of_a_dead_process_is_free(tmp_path: Path) -> None:
    target, marks = tmp_path / "entry", tmp_path / "marks"

    def dies_with_the_lock() -> dict[str, Any]:
        with sole_writer(target):
            os.kill(os.getpid(), signal.SIGKILL)
        return {}

    assert forked(dies_with_the_lock) == (-signal.SIGKILL, {})
    assert (tmp_path / ".entry.lock").exists()
    child = 0
    with sole_writer(target, wait=True):
        child = os.fork()
        if child == 0:
            with sole_writer(target, wait=True):
                marks.write_text("second")
            os._exit(0)
        time.sleep(0.2)
        assert not marks.exists()
    os.waitpid(child, 0)
    assert marks.read_text() == "second"
    assert not (tmp_path / ".entry.lock").exists()


def test_a_journal_of_other_work_or_damaged_is_not_resumed(dense_source: DenseSource, tmp_path: Path) -> None:
    source, out = dense_source(), tmp_path / "out"
    factorize_quietly(weights_only(source, tmp_path / "straight"))
    wanted = directory_bytes(tmp_path / "straight")
    journal = tmp_path / ".out.journal.json"
    for content in ("{", "[]", '{"fingerprint": "x"}', '{"fingerprint": 1, "shards": {"a": 1}}', None):
        killed(weights_only(source, out, seed=1), SHARD.format(3))
        if content is not None:
            journal.write_text(content)
        progress = SilentProgress()
        factorize(weights_only(source, out), progress)
        assert any("starting over" in note for note in progress.notes), content
        assert directory_bytes(out) == wanted
        assert leftovers(out) == []
        shutil.rmtree(out)


def test_a_damaged_finished_shard_is_made_again(dense_source: DenseSource, tmp_path: Path) -> None:
    source, out = dense_source(), tmp_path / "out"
    factorize_quietly(weights_only(source, tmp_path / "straight"))
    killed(weights_only(source, out), SHARD.format(3))
    shard = next((tmp_path / ".out.partial").glob("model-00002-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    (tmp_path / ".out.partial" / "folder").mkdir()
    factorize_quietly(weights_only(source, out))
    assert directory_bytes(out) == directory_bytes(tmp_path / "straight")


HANGS_AT_THE_SEVENTH_WRITE = """
import os, pathlib, time
fsync, calls = os.fsync, []
def hanging(handle):
    calls.append(handle)
    if len(calls) == 7:
        pathlib.Path(os.environ["REACHED"]).touch()
        time.sleep(120)
    fsync(handle)
os.fsync = hanging
"""


def test_interrupted_in_a_process_of_its_own_it_says_how_to_go_on(dense_source: DenseSource, tmp_path: Path) -> None:
    """As a user presses Ctrl-C; test_interrupts.py sends signals to every verb, in forks of this process."""
    out, reached = tmp_path / "out", tmp_path / "reached"
    arguments = ["factorize", dense_source(), "-n", 4, "--strategy", "contiguous", "--router", "random", "--out", out]
    process = cli_process(*arguments, prelude=HANGS_AT_THE_SEVENTH_WRITE, REACHED=str(reached))
    while not reached.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    outcome = finished(process)
    assert outcome.code == ExitCode.INTERRUPTED
    assert "interrupted; finished parts are kept: run the same command again to go on" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert outcome.stdout == ""
    assert not out.exists()
    assert ".out.lock" not in leftovers(out)
    again = cli(*arguments)
    assert again.code == ExitCode.DONE
    assert "resuming: 3 of 3 shards are already written" in again.message
    assert leftovers(out) == []
