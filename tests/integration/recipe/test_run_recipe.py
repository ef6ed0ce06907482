"""Recipes on a tiny model: stages follow one another, and a second run redoes only what changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import DenseSource
from support.command_line import cli

from factorctl.errors import ExitCode


@pytest.fixture
def source(dense_source: DenseSource, tmp_path: Path) -> Path:
    """A dense model of the test's own, to be changed by it."""
    return Path(shutil.copytree(dense_source(), tmp_path / "dense"))


@pytest.fixture
def text(text_file: Path, tmp_path: Path) -> Path:
    """A document per paragraph, so that some can be held out."""
    path = tmp_path / "words.jsonl"
    path.write_text("".join(json.dumps({"text": part}) + "\n" for part in text_file.read_text().split("\n\n")))
    return path


def recipe(source: Path, text: Path, *, experts: int = 4, tokens: int = 512, last: str = "[export]\n") -> Path:
    path = text.with_name("mine.toml")
    path.write_text(
        f"""
[factorize]
model = {json.dumps(str(source))}
experts = {experts}
strategy = "contiguous"
router = "random"

[finetune]
tokens = {tokens}
data = {json.dumps(str(text))}
block-length = 64
batch-tokens = 128
heldout-tokens = 256

{last}"""
    )
    return path


def statuses(path: Path, workspace: Path, *options: str) -> dict[str, str]:
    outcome = cli("run", path, "--workspace", workspace, "--format", "json", *options)
    assert outcome.code == ExitCode.DONE, outcome.stderr
    return {stage["stage"]: stage["status"] for stage in outcome.json["stages"]}


def test_a_second_run_redoes_only_what_changed(source: Path, text: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    path = recipe(source, text)
    planned = statuses(path, runs, "--dry-run")
    assert set(planned.values()) == {"would run"}
    assert not runs.exists()
    assert set(statuses(path, runs).values()) == {"done"}
    assert (runs / "mine" / "export-hf" / "factorctl.json").is_file()
    assert set(statuses(path, runs).values()) == {"reused"}

    path = recipe(source, text, tokens=640)
    assert statuses(path, runs, "--dry-run") == {
        "factorize": "would be reused",
        "finetune": "would run",
        "export-hf": "would run",
    }
    assert statuses(path, runs) == {"factorize": "reused", "finetune": "done", "export-hf": "done"}

    text.write_text(text.read_text().replace("a", "b", 1))
    assert statuses(path, runs, "--dry-run")["finetune"] == "would run"
    text.write_text(text.read_text().replace("b", "a", 1))

    (runs / "mine" / "finetuned" / "factorctl.json").unlink()
    assert statuses(path, runs, "--dry-run")["finetune"] == "would run"


def test_a_changed_source_is_factorized_again(source: Path, text: Path, tmp_path: Path) -> None:
    path, runs = recipe(source, text, last=""), tmp_path / "runs"
    statuses(path, runs)
    config = json.loads((source / "generation_config.json").read_text())
    (source / "generation_config.json").write_text(json.dumps({**config, "max_length": 77}))
    assert statuses(path, runs, "--dry-run") == {"factorize": "would run", "finetune": "would run"}


def test_a_failing_stage_keeps_the_ones_before_it(source: Path, text: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    outcome = cli("run", recipe(source, text, tokens=1_000_000), "--workspace", runs)
    assert outcome.code == ExitCode.USAGE
    assert "--max-epochs" in outcome.message
    assert statuses(recipe(source, text), runs) == {"factorize": "reused", "finetune": "done", "export-hf": "done"}


def test_a_damaged_lock_is_named(source: Path, text: Path, tmp_path: Path) -> None:
    lock = tmp_path / "runs" / "mine" / "recipe.lock.json"
    lock.parent.mkdir(parents=True)
    lock.write_text('{"stages": 3}')
    outcome = cli("run", recipe(source, text), "--workspace", tmp_path / "runs")
    assert outcome.code == ExitCode.INTEGRITY
    assert "recipe.lock.json is damaged" in outcome.message
