"""An evaluation that was interrupted goes on, and nothing that changed is reused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from support.evaluating import SIZES, run
from support.tiny import make_documents

from factorctl.config.evaluate import EvalConfig
from factorctl.evaluation.perplexity import score_text
from factorctl.pipeline.evaluate import measure as evaluate_measure
from factorctl.pipeline.evaluate import plan as evaluate_plan
from factorctl.pipeline.evaluate.result import EvalResult
from factorctl.pipeline.evaluate.run import evaluate
from factorctl.progress import SilentProgress

pytestmark = pytest.mark.usefixtures("no_collection", "no_pictures")


class Interrupting:
    """Scores texts, and is interrupted at the call of a given number."""

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return score_text(*arguments, **options)


def same_figures(a: EvalResult, b: EvalResult) -> bool:
    return all(getattr(a, name) == getattr(b, name) for name in ("perplexity", "tasks", "controls", "fidelity"))


def test_an_interrupted_run_goes_on_where_it_stopped(
    checkpoint: Path, text: Path, task_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"data": (str(text),), "tasks": ("piqa",), "task_data": task_files}
    whole = run(checkpoint, tmp_path / "whole", **options)
    monkeypatch.setattr(evaluate_measure, "score_text", Interrupting(at=2))
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, tmp_path / "out", **options)
    assert not (tmp_path / "out" / "results.json").exists()
    counting = Interrupting(at=-1)
    monkeypatch.setattr(evaluate_measure, "score_text", counting)
    resumed = run(checkpoint, tmp_path / "out", resume=True, **options)
    assert counting.calls == 1, "the dense model's text and task were finished"
    assert resumed.parts == {"computed": 3, "reused": 2}
    assert same_figures(whole, resumed)
    again = run(checkpoint, tmp_path / "out", resume=True, **options)
    assert again.parts == {"computed": 0, "reused": 5}
    assert same_figures(whole, again)


def test_without_resume_everything_is_computed_again(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert run(checkpoint, tmp_path / "out", data=(str(text),)).parts == {"computed": 3, "reused": 0}


def test_what_changed_is_never_reused(checkpoint: Path, refitted: Path, text: Path, tmp_path: Path) -> None:
    own = Path(shutil.copy(text, tmp_path / "words.jsonl"))
    out, notes = tmp_path / "out", SilentProgress()

    def resumed(made: Path = checkpoint, **options: Any) -> dict[str, int]:
        config = EvalConfig(checkpoint=str(made), out=out, data=(str(own),), resume=True, **(SIZES | options))
        return evaluate(config, notes).parts

    assert resumed() == {"computed": 3, "reused": 0}
    assert resumed() == {"computed": 0, "reused": 3}
    assert resumed(stride=8) == {"computed": 3, "reused": 0}, "another option"
    assert any("changed since; computed again" in note for note in notes.notes)
    assert resumed(refitted, stride=8) == {"computed": 2, "reused": 1}, "other weights; the dense model's stay"
    make_documents(own, seed=5)
    assert resumed(refitted, stride=8) == {"computed": 3, "reused": 0}, "another text"
    assert resumed(refitted, stride=8, dtype="bfloat16") == {"computed": 3, "reused": 0}, "another dtype"


def test_a_damaged_part_is_computed_again(checkpoint: Path, text: Path, task_files: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"data": (str(text),), "tasks": ("piqa",), "task_data": task_files}
    first = run(checkpoint, tmp_path / "out", **options)
    for pattern in ("dense-perplexity-*.json", "model-task-*.jsonl"):
        (damaged,) = (tmp_path / "out" / "parts").glob(pattern)
        damaged.write_bytes(damaged.read_bytes()[:-20])
    (meddled,) = (tmp_path / "out" / "parts").glob("model-fidelity-*.json")
    meddled.write_text(meddled.read_text().replace('"relative_error": 0.', '"relative_error": 1.'))
    again = run(checkpoint, tmp_path / "out", resume=True, **options)
    assert again.parts == {"computed": 3, "reused": 2}
    assert same_figures(first, again)


def test_a_part_of_another_version_is_computed_again(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older version's parts held other figures under the same options."""
    run(checkpoint, tmp_path / "out", data=(str(text),))
    monkeypatch.setattr(evaluate_plan, "_field_names", lambda kind: ["another"])
    assert run(checkpoint, tmp_path / "out", data=(str(text),), resume=True).parts == {"computed": 3, "reused": 0}
