"""Every verb that writes, killed, starved of disk or refused at each of its writes."""

from __future__ import annotations

import errno
import resource
from pathlib import Path

from bench import Bench
from faults.tally import Tally
from injection import die_at, refused_at
from sampling import tried
from support.tiny import leftovers
from verbs import HERE, ROWS, each_row

TAKES_SPACE = ("open", "write", "fsync", "mkdir", "rename")
LIMITS = (0, 100, 2_000, 12_000, 40_000)
"""Bytes that a file may hold."""


@each_row(replacing=True)
def test_killed_at_any_write(
    name: str, replaces: bool, bench: Bench, tmp_path: Path, every_fault: bool, tally: Tally
) -> None:
    points = bench.points(name, replaces=replaces)
    for point, place in bench.places(name, tmp_path, tried(points, name, every_fault, 1 + replaces), replaces=replaces):
        with tally.case("SIGKILL at a write point", name):
            assert place.run(die_at(point)).status == -9, f"point {point}, {points[point]}, was not reached"
            place.assert_nothing_lost()
            place.assert_finished()
            assert set(leftovers(place.out)) <= {".out.lock", ".out.training.lock", ".out.journal.json"}


@each_row(replacing=True)
def test_a_full_or_read_only_disk_at_any_write(
    name: str, replaces: bool, bench: Bench, tmp_path: Path, every_fault: bool, tally: Tally
) -> None:
    points = bench.points(name, replaces=replaces)
    for point, place in bench.places(name, tmp_path, tried(points, name, every_fault, 2 + replaces), replaces=replaces):
        takes_space = points[point].startswith(TAKES_SPACE)
        fault = "disk full at a write point" if takes_space else "disk turns read-only at a removal"
        with tally.case(fault, name):
            fate = place.run(refused_at(point, errno.ENOSPC if takes_space else errno.EROFS))
            place.assert_nothing_lost()
            if fate.code:  # a temporary file that cannot be removed stops nobody
                assert fate.code == 4, f"{points[point]}: {fate.message}"
                said = "no space left" if takes_space else "cannot be written: Read-only file system"
                assert said in fate.message, f"{points[point]}: {fate.message}"
                assert "hint: " in fate.message
            place.assert_finished()


@each_row()
def test_a_file_size_limit_reads_as_a_full_disk(name: str, bench: Bench, tmp_path: Path, tally: Tally) -> None:
    """What the kernel itself refuses, in the middle of a file."""
    largest = max(len(content) for content in bench.wanted(name).values())
    for limit in (limit for limit in LIMITS[:: 2 if ROWS[name].repeats else 1] if limit < largest):
        place = bench.place(name, tmp_path / f"{limit}")
        with tally.case("disk full in the kernel (RLIMIT_FSIZE)", name):
            fate = place.run(prepare=lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
            assert fate.code == 4, f"{limit}: {fate.message}"
            assert "no space left" in fate.message
            assert "hint: free some" in fate.message
            place.assert_nothing_lost()
            place.assert_finished()


def test_the_suite_tries_enough_points(bench: Bench) -> None:
    """At least fifty over the pipeline, in every kind of call."""
    names = [point for name in HERE for point in bench.points(name)]
    assert len(names) > 300
    calls = {point.partition(" ")[0] for point in names}
    assert calls >= {"open", "write", "fsync", "rename", "remove", "mkdir", "truncate"}
    assert any(point.startswith("swap") for point in bench.points("factorize", replaces=True))
