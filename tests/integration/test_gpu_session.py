"""The GPU session in its rehearsal: machine time is short, so that nothing in it may be broken when there is some."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TIMEOUT = 800
"""Seconds; on two quiet cores it takes less than one minute."""
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_session.sh"


@pytest.mark.timeout(TIMEOUT + 60)
def test_every_part_runs_and_leaves_its_report(tmp_path: Path) -> None:
    environment = os.environ | {"OUT": str(tmp_path / "out")}
    command = ["bash", str(SCRIPT), "--rehearse", "--python", sys.executable, "--work", str(tmp_path / "work")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-2000:]
    reports = {file.name: file for file in (tmp_path / "out").iterdir()}
    assert len(reports) <= 8, "as many files come back from a machine"

    records = [json.loads(line) for line in reports["cells.jsonl"].read_text().splitlines()]
    assert not [record["error"] for record in records if "error" in record]
    methods = {(record["cell"]["method"], record["cell"]["tokens"]) for record in records if "cell" in record}
    assert methods >= {("routed", 0), ("static", 0), ("routed", 256), ("static", 256)}

    report = reports["routing.md"].read_text()
    assert "| 1R4E2K | 50% | 0 | routed |" in report
    assert "| 50-2of4 routed | piqa | 2 |" in report
    assert "Failed" not in report
    latency = reports["latency.md"].read_text()
    assert all(heading in latency for heading in ("| decode | 2 |", "Compiled,", "Training, blocks of 64"))
    assert "Error" not in latency
