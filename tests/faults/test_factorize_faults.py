"""`factorize` killed, starved of disk or raced at every write: what stood there stays whole, and the next run goes on.

A run is done in a forked child whose system calls that write are counted; the child dies, by SIGKILL, before the
n-th of them. So no handler, no `finally` and no buffer softens the blow.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from conftest import DenseSource
from helpers import calibrated, directory_bytes, factorize_quietly, leftovers, weights_only
from helpers_cli import cli, cli_process, finished

from factorctl.checkpoint import publishing
from factorctl.checkpoint.manifest import check_files, read_manifest
from factorctl.checkpoint.publishing import sole_writer
from factorctl.config import FactorizeConfig
from factorctl.errors import ExitCode, ResourceError, UsageError
from factorctl.pipeline.factorize import factorize
from factorctl.pipeline.layer_factoring import LayerFactory
from factorctl.progress import SilentProgress

FILLS = [(os, "fsync"), (os, "replace"), (os, "rename")]
WRITES = [*FILLS, (os, "unlink"), (publishing, "_swap"), (shutil, "rmtree")]


def intercept(calls: list[tuple[ModuleType, str]], before: Callable[[int], None]) -> list[int]:
    """Call `before(n)` ahead of the n-th write; returns a list of one item, how many there were. Not undone."""
    count = [0]

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            before(count[0])
            count[0] += 1
            return function(*arguments, **options)

        return call

    for module, name in calls:
        setattr(module, name, counted(getattr(module, name)))
    return count


def in_a_child(work: Callable[[], int]) -> int:
    """Run `work` in a forked child; its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def count_writes(config: FactorizeConfig, calls: list[tuple[ModuleType, str]] = WRITES) -> int:
    def work() -> int:
        count = intercept(calls, lambda n: None)
        factorize_quietly(config)
        return count[0]

    return in_a_child(work)


def kill_at(write: int, config: FactorizeConfig) -> None:
    def before(n: int) -> None:
        if n == write:
            os.kill(os.getpid(), signal.SIGKILL)

    def work() -> int:
        intercept(WRITES, before)
        factorize_quietly(config)
        return 0

    assert in_a_child(work) == -signal.SIGKILL


def assert_whole(checkpoint: Path) -> None:
    assert len(list(check_files(checkpoint, read_manifest(checkpoint)))) == len(read_manifest(checkpoint).files)


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
    "calibrated": lambda source, out, text: calibrated(source, out, text, strategy="permuted"),
    "statistics": lambda source, out, text: calibrated(
        source, out, text, strategy="permuted", router="random", scale="sum", refit=False
    ),
}
EVERY_NTH_WRITE = {"weights-only": 1, "calibrated": 2, "statistics": 3}


@pytest.mark.parametrize("kind", CONFIGS)
def test_killed_at_any_write_it_goes_on_and_ends_with_the_same_bytes(
    kind: str, dense_source: DenseSource, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = dense_source()
    configs = [CONFIGS[kind](source, tmp_path / name, text_file) for name in ("straight", "counted")]
    factorize_quietly(configs[0])
    wanted = directory_bytes(tmp_path / "straight")
    writes = count_writes(configs[1])
    assert 25 < writes < 90
    resumed = set()
    for write in range(0, writes, EVERY_NTH_WRITE[kind]):
        out = tmp_path / f"killed-{write}"
        config = CONFIGS[kind](source, out, text_file)
        kill_at(write, config)
        if out.exists():
            assert_whole(out)
            with pytest.raises(UsageError, match="exists"):
                factorize_quietly(config)
        else:
            shards, layers = finish(config, monkeypatch)
            resumed.add((shards, layers))
            assert layers >= 2 - shards
            assert layers == 0 or shards < 3
        assert directory_bytes(out) == wanted, f"killed before write {write}"
        assert set(leftovers(out)) <= {f".{out.name}.lock", f".{out.name}.journal.json"} if shards == 3 else True
        shutil.rmtree(out)
    assert resumed == {(0, 2), (1, 1), (2, 0), (3, 0)}, "each finished shard is work saved"


def test_overwriting_leaves_the_old_or_the_new_checkpoint_whole_at_any_kill(
    dense_source: DenseSource, tmp_path: Path
) -> None:
    source = dense_source("llama", num_hidden_layers=1)
    out = tmp_path / "out"
    old, new = weights_only(source, out), weights_only(source, out, num_experts=6, overwrite=True)
    factorize_quietly(old)
    before = directory_bytes(out)
    writes = count_writes(new)
    after = directory_bytes(out)
    assert before != after
    seen = []
    for write in [*range(0, writes - 9, 8), *range(writes - 9, writes)]:
        shutil.rmtree(out)
        factorize_quietly(old)
        kill_at(write, new)
        found = directory_bytes(out)
        assert found in (before, after), f"killed before write {write}"
        seen.append(found == after)
        factorize_quietly(new)
        assert directory_bytes(out) == after
        assert leftovers(out) == []
    assert seen == sorted(seen), "once the new one stands there, it stays"
    assert set(seen) == {False, True}


@pytest.mark.parametrize("failure", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_at_any_write_keeps_what_is_finished(
    failure: int, dense_source: DenseSource, tmp_path: Path
) -> None:
    source = dense_source("llama", num_hidden_layers=1)
    factorize_quietly(weights_only(source, tmp_path / "straight"))
    wanted = directory_bytes(tmp_path / "straight")
    for write in range(0, count_writes(weights_only(source, tmp_path / "counted"), FILLS), 3):
        out = tmp_path / f"full-{write}"
        config = weights_only(source, out)

        def before(n: int, write: int = write) -> None:
            if n == write:
                raise OSError(failure, os.strerror(failure))

        def work(config: FactorizeConfig = config, before: Callable[[int], None] = before) -> int:
            intercept(FILLS, before)
            try:
                factorize_quietly(config)
            except ResourceError as error:
                return int("no space left while writing" in error.message and "free some disk" in str(error.hint))
            return 2

        assert in_a_child(work) == 1
        if not out.exists():
            factorize_quietly(config)
        assert directory_bytes(out) == wanted


def test_a_file_size_limit_reads_as_a_full_disk(dense_source: DenseSource, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def work() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        outcome = cli("factorize", dense_source(), "-n", 4, "--strategy", "contiguous", "--router", "random", "-o", out)
        return outcome.code if "no space left while writing" in outcome.message else 98

    dense_source()
    assert in_a_child(work) == ExitCode.RESOURCES
    assert not out.exists()
    assert cli("factorize", dense_source(), "-n", 4, "--router", "random", "-o", out).code == ExitCode.DONE


def test_two_writers_of_one_output(dense_source: DenseSource, tmp_path: Path) -> None:
    config = weights_only(dense_source(), tmp_path / "out")
    with sole_writer(tmp_path / "out"):

        def second() -> int:
            try:
                factorize_quietly(config)
            except UsageError as error:
                expected = f"is being written by process {os.getppid()} on "
                return int(expected in error.message and "choose another --out" in str(error.hint))
            return 2

        assert in_a_child(second) == 1
    assert not (tmp_path / "out").exists()
    factorize_quietly(config)
    assert leftovers(tmp_path / "out") == []


def test_a_second_run_waits_for_the_cache_and_the_lock_of_a_dead_process_is_free(tmp_path: Path) -> None:
    target, marks = tmp_path / "entry", tmp_path / "marks"

    def dies_with_the_lock() -> int:
        with sole_writer(target):
            os.kill(os.getpid(), signal.SIGKILL)
        return 0

    assert in_a_child(dies_with_the_lock) == -signal.SIGKILL
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
        kill_at(9, weights_only(source, out, seed=1))
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
    kill_at(10, weights_only(source, out))
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


@pytest.mark.parametrize(
    ("sent", "code", "word"),
    [(signal.SIGINT, ExitCode.INTERRUPTED, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_interrupted_by_a_signal_it_says_how_to_go_on(
    sent: signal.Signals, code: int, word: str, dense_source: DenseSource, tmp_path: Path
) -> None:
    out, reached = tmp_path / "out", tmp_path / "reached"
    arguments = ["factorize", dense_source(), "-n", 4, "--strategy", "contiguous", "--router", "random", "--out", out]
    process = cli_process(*arguments, prelude=HANGS_AT_THE_SEVENTH_WRITE, REACHED=str(reached))
    while not reached.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(sent)
    outcome = finished(process)
    assert outcome.code == code
    assert f"{word}; finished parts are kept: run the same command again to go on" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert outcome.stdout == ""
    assert not out.exists()
    assert ".out.lock" not in leftovers(out)
    again = cli(*arguments)
    assert again.code == ExitCode.DONE
    assert "resuming: 3 of 3 shards are already written" in again.message
    assert leftovers(out) == []
