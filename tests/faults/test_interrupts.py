"""Ctrl-C and SIGTERM in every stage of every verb: the right exit code, a word of what to do, and the same end."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path

from bench import Bench
from faults.tally import Tally
from injection import signalled_at
from sampling import moments
from support.command_line import cli_process, finished
from verbs import ROWS, each_row

from factorctl.cli.app import GOING_ON_ALONE

SENT = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}


@each_row()
def test_a_signal_at_any_moment(name: str, bench: Bench, tmp_path: Path, every_fault: bool, tally: Tally) -> None:
    row, points = ROWS[name], bench.points(name)
    tried = moments(points, name, every_fault)
    for point, place in bench.places(name, tmp_path, tried):
        sent = list(SENT)[tried.index(point) % 2]
        code, word = SENT[sent]
        with tally.case("Ctrl-C or SIGTERM", name):
            fate = place.run(signalled_at(point, sent))
            assert fate.code == code, f"{points[point]}: {fate.message}"
            goes_on = "; finished parts are kept: run the same command again" if row.verb in GOING_ON_ALONE else ""
            assert f"{word}{goes_on}" in fate.message, points[point]
            assert ("finished parts are kept" in fate.message) == bool(goes_on)
            assert "Traceback" not in fate.message
            place.assert_nothing_lost()
            place.assert_finished()


def test_a_second_signal_does_not_wait_for_the_step(bench: Bench, tmp_path: Path, tally: Tally) -> None:
    """The first lets training finish its step and save; the second ends at once, and the last saved state is good."""
    name = "finetune"
    points = bench.points(name)
    steps = [number for number, point in enumerate(points) if point.startswith("open") and "metrics.jsonl" in point]
    place = bench.place(name, tmp_path / "place")
    with tally.case("Ctrl-C or SIGTERM", "finetune, twice"):
        fate = place.run(signalled_at(steps[-1], signal.SIGTERM, signal.SIGTERM))
        assert fate.code == 143
        assert "go on with the same command and --resume" not in fate.message
        place.assert_nothing_lost()
        place.assert_finished()


def test_an_evaluation_says_how_its_measurements_are_reused(bench: Bench, tmp_path: Path, tally: Tally) -> None:
    place = bench.place("eval", tmp_path / "place")
    place = dataclasses.replace(place, arguments=tuple(word for word in place.arguments if word != "--resume"))
    with tally.case("Ctrl-C or SIGTERM", "eval, without --resume"):
        fate = place.run(signalled_at(bench.points("eval").index("rename runs/out/results.json"), signal.SIGINT))
        assert fate.code == 130
        assert "the same command with --resume reuses the measurements that are finished" in fate.message
        again = place.run(None, "--resume")
        assert "5 of 5 measurements were taken from an earlier run" in again.outcome.stdout
        assert place.result() == place.wanted


def test_an_evaluation_without_measurements_promises_none(bench: Bench, tmp_path: Path, tally: Tally) -> None:
    place = bench.place("eval", tmp_path / "place")
    place = dataclasses.replace(place, arguments=tuple(word for word in place.arguments if word != "--resume"))
    with tally.case("Ctrl-C or SIGTERM", "eval, before its first measurement"):
        points = bench.points("eval")
        first = next(number for number, point in enumerate(points) if "runs/out/parts/" in point)
        fate = place.run(signalled_at(first, signal.SIGINT))
        assert fate.code == 130
        assert "--resume" not in fate.message


def test_an_import_that_is_interrupted_is_no_fault_of_the_library() -> None:
    """numpy makes an ImportError of a KeyboardInterrupt that reaches it while it is loaded."""
    prelude = """
import os, signal, sys
class Interrupted:
    def find_spec(self, name, path=None, target=None):
        if name == "factorctl.pipeline.inspect.installation":
            try:
                os.kill(os.getpid(), signal.SIGINT)
                signal.pause()
            except KeyboardInterrupt:
                raise ImportError("cannot load module more than once per process") from None
sys.meta_path.insert(0, Interrupted())
"""
    outcome = finished(cli_process("doctor", prelude=prelude))
    assert outcome.code == 130
    assert outcome.stderr == "interrupted\n"
