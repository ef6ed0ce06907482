"""An evaluation that was interrupted goes on, and nothing that changed is reused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import DenseSource
from eval_support import SIZES, run, write_tasks, write_text
from helpers import calibrated, factorize_quietly, weights_only

from factorctl.config import EvalConfig
from factorctl.evaluation.perplexity import score_text
from factorctl.pipeline import evaluate as pipeline
from factorctl.pipeline import evaluate_measure, evaluate_plan
from factorctl.pipeline.evaluate import evaluate
from factorctl.pipeline.evaluate_result import EvalResult
from factorctl.progress import SilentProgress


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes half a second each time and is not what these tests are about."""
    monkeypatch.setattr(evaluate_measure, "_release_memory", lambda: None)
    monkeypatch.setattr(pipeline, "draw_fidelity", lambda *_, **__: b"")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "words.jsonl")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("bench") / "bench")


@pytest.fixture(scope="module")
def checkpoint(dense_source: DenseSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1R4E2K with a random router, dense values; not to be changed."""
    out = tmp_path_factory.mktemp("made") / "tiny"
    factorize_quietly(weights_only(dense_source(), out))
    return out


@pytest.fixture(scope="module")
def refitted(dense_source: DenseSource, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared neurons, an analytic router, and values that are no longer the dense ones."""
    out = tmp_path_factory.mktemp("made") / "refitted"
    factorize_quietly(calibrated(dense_source(), out, text, scale="sum"))
    return out


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
    checkpoint: Path, text: Path, bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"data": (str(text),), "tasks": ("piqa",), "task_data": bench}
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
    write_text(own, seed=5)
    assert resumed(refitted, stride=8) == {"computed": 3, "reused": 0}, "another text"
    assert resumed(refitted, stride=8, dtype="bfloat16") == {"computed": 3, "reused": 0}, "another dtype"


def test_a_damaged_part_is_computed_again(checkpoint: Path, text: Path, bench: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"data": (str(text),), "tasks": ("piqa",), "task_data": bench}
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
