"""Ctrl-C and SIGTERM in every stage of every verb: the right exit code, a word of what to do, and the same end."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from faults.tally import Tally
from helpers import directory_bytes
from injection import signalled_at
from verbs import ROWS, Bench

SENT = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}
MOMENTS = {"finetune": 6}
"""How many moments of a run are tried by default; 8 where nothing is said."""


def moments(points: tuple[str, ...], wanted: int) -> list[int]:
    """Numbers of points, evenly spread from the first to the last."""
    return sorted({round(part * (len(points) - 1) / (wanted - 1)) for part in range(wanted)})


@pytest.mark.parametrize("name", ROWS)
def test_a_signal_at_any_moment(name: str, bench: Bench, tmp_path: Path, every_fault: bool, tally: Tally) -> None:
    points = bench.points(name)
    kept = directory_bytes(bench.reads(name))
    for index, point in enumerate(moments(points, len(points) if every_fault else MOMENTS.get(name, 8))):
        sent = list(SENT)[index % 2]
        code, word = SENT[sent]
        place = bench.place(name, tmp_path / f"{point}")
        with tally.case("Ctrl-C or SIGTERM", name):
            fate = place.run(signalled_at(point, sent))
            assert fate.code == code, f"{points[point]}: {fate.message}"
            assert f"{word}; finished parts are kept: run the same command again" in fate.message, points[point]
            assert "Traceback" not in fate.message
            place.assert_nothing_lost(kept)
            place.assert_finished()
        shutil.rmtree(place.root)


def test_a_second_signal_does_not_wait_for_the_step(bench: Bench, tmp_path: Path, tally: Tally) -> None:
    """The first lets training finish its step and save; the second ends at once, and the last saved state is good."""
    name = "finetune"
    points = bench.points(name)
    kept = directory_bytes(bench.reads(name))
    steps = [number for number, point in enumerate(points) if point.startswith("open") and "metrics.jsonl" in point]
    place = bench.place(name, tmp_path / "place")
    with tally.case("Ctrl-C or SIGTERM", "finetune, twice"):
        fate = place.run(signalled_at(steps[-1], signal.SIGTERM, signal.SIGTERM))
        assert fate.code == 143
        assert "go on with the same command and --resume" not in fate.message
        place.assert_nothing_lost(kept)
        place.assert_finished()
