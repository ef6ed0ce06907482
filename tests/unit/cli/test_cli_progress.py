"""What is drawn while something long runs."""

from __future__ import annotations

import pytest

from factorctl.cli.render import RichProgress


def test_what_a_stage_says_of_itself_does_not_push_out_the_remaining_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    fields = {"lm": 4.2321, "kd": 0.2266, "par": 1.095, "balance": 1.007, "z": 0.3, "tok/s": 1149, "agree": "67%"}
    with RichProgress().stage("Training", total=100, unit="tokens") as task:
        task.advance(100, **fields, busiest="71.2% (layer 1 expert 2)", idlest="30.1% (layer 0 expert 1)")
    bar, *below = (line.strip() for line in capsys.readouterr().err.strip().splitlines())
    assert bar.startswith("Training ")
    assert "100/100 tokens" in bar
    assert "eta" in bar
    assert " ".join(below).startswith("lm 4.232  kd 0.2266  par 1.095")
    assert " ".join(below).endswith("idlest 30.1% (layer 0 expert 1)")


def test_a_note_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    progress = RichProgress()
    for _ in range(2):
        progress.note("calibrating on text sampled from the model itself")
    assert capsys.readouterr().err.count("sampled from the model itself") == 1
