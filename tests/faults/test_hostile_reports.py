"""Hostile reports, parts of an evaluation, locks of recipes, tuned paths and recipes: refused, or computed again."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench import Bench
from comparing import LOCK_NAME
from faults.tally import Tally
from sandbox import Sandbox, try_cases
from support.command_line import cli

from factorctl.errors import IntegrityError, UsageError
from factorctl.evaluation.tasks import read_samples
from factorctl.ffn import tuned as tuned_paths
from factorctl.ffn.tuned import write_tuned
from factorctl.files.strict_json import SEAL, dump_sealed, parse_json_object
from factorctl.pipeline.evaluate.parts import Measurement, PartStore
from factorctl.pipeline.recipe.lock import RecipeLock
from factorctl.pipeline.recipe.read import parse_recipe
from factorctl.progress import SilentProgress


@pytest.fixture
def evaluated(bench: Bench, tmp_path: Path) -> Iterator[Sandbox]:
    """A finished evaluation."""
    sandbox = Sandbox(tmp_path / "evaluated", bench.made("eval"))
    yield sandbox
    sandbox.assert_untouched()


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Sandbox]:
    (tmp_path / "nothing").mkdir()
    sandbox = Sandbox(tmp_path / "empty", tmp_path / "nothing")
    yield sandbox
    sandbox.assert_untouched()


def test_reports_that_are_compared(evaluated: Sandbox, tally: Tally) -> None:
    whole = evaluated.inside / "whole.json"
    path = Path(shutil.copy(evaluated.inside / "results.json", whole)).with_name("results.json")

    def read(content: bytes) -> bool:
        path.write_bytes(content)
        outcome = cli("eval", "--compare", whole, path)
        assert outcome.code in (0, 2, 3), outcome
        return outcome.code == 0

    try_cases(read, whole.read_bytes(), 300, evaluated, tally, "results.json, compared", least_refused=0.3)


def test_answers_of_an_evaluation(evaluated: Sandbox, tally: Tally) -> None:
    path = next(evaluated.inside.glob("samples_*_model.jsonl"))
    whole = read_samples(path)
    lines = path.read_bytes().splitlines()

    def read(content: bytes) -> None:
        path.write_bytes(b"\n".join([content.rstrip(), *lines[1:]]))
        assert read_samples(path).documents == whole.documents

    try_cases(read, lines[0], 300, evaluated, tally, "answers of an evaluation")


def test_parts_of_an_evaluation(empty: Sandbox, tally: Tally) -> None:
    """One that cannot be trusted is computed again, never an error."""
    store = PartStore(empty.inside, resume=True, progress=SilentProgress())
    part, result = (
        Measurement("model", "perplexity", "text", {"weights": "x"}),
        {"documents": [{"loss": 1.5}], "share": None},
    )
    store.keep(part, result)

    def read(content: bytes) -> bool:
        store.path_of(part).write_bytes(content)
        found = store.find(part)
        assert found in (None, result), f"another result: {found}"
        return found is not None

    try_cases(read, store.path_of(part).read_bytes(), 500, empty, tally, "part of an evaluation")


@pytest.mark.parametrize("sealed", [True, False], ids=["sealed again", "as it was"])
def test_locks_of_recipes(sealed: bool, empty: Sandbox, tally: Tally) -> None:
    """A flipped digit in a recorded figure is found; who knows how to seal can still break nothing."""
    path = empty.inside / LOCK_NAME
    lock = {"stages": {"eval": {"begun": "x", "finished": "x", "evidence": "y", "result": {"perplexity": 1.5}}}}

    def seal(content: bytes) -> bytes:
        try:
            value = parse_json_object(content.decode(), origin="the lock")
        except (IntegrityError, UnicodeDecodeError):
            return content
        value.pop(SEAL, None)
        return dump_sealed(value) if sealed else content

    def read(content: bytes) -> None:
        path.write_bytes(seal(content))
        found = RecipeLock(path)
        for stage in ("factorize", "eval"):
            assert isinstance(found.result(stage), dict)
            found.begun(stage)
        assert sealed or json.loads(content)[SEAL] == json.loads(dump_sealed(lock))[SEAL]

    what = f"{LOCK_NAME}, sealed again" if sealed else LOCK_NAME
    try_cases(read, dump_sealed(lock), 300, empty, tally, what)


def test_tuned_paths(empty: Sandbox, tally: Tally) -> None:
    """A cache that cannot be read is said to be damaged, and the shipped paths are taken."""
    path = empty.inside / "paths.json"
    steps = {"cpu | float32 | D32": ((5, "masked"), (None, "grouped"))}
    write_tuned(path, steps)

    def read(content: bytes) -> bool:
        path.write_bytes(content)
        tuned_paths.forget()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = tuned_paths.ladders(path)
        assert found or said or json.loads(content)["sites"] == {}
        return not said

    try_cases(read, path.read_bytes(), 500, empty, tally, "tuned paths")


def test_recipes(empty: Sandbox, tally: Tally) -> None:
    """What TOML can say, as far as the stages' options: others are unknown."""
    recipe = {
        "name": "mine",
        "seed": 1,
        "device": "cpu",
        "factorize": {"model": "x", "experts": 4, "shared-fraction": 0.25, "option": {"by": "weights"}},
        "finetune": {"tokens": "60K", "loss": {"kd": 0.5}, "data": "text.jsonl"},
        "eval": {"data": ["a.jsonl", "b.jsonl"], "tasks": ["piqa"]},
        "profile": {"batch": [1, 8], "latency": False},
        "export": [{"to": "hf"}, {"to": "gguf", "quant": "q8_0"}],
    }

    def read(content: bytes) -> None:
        try:
            value = parse_json_object(content.decode(), origin="the recipe")
        except UnicodeDecodeError:
            raise UsageError("the recipe is no text") from None
        parse_recipe(value, default_name="x", origin="the recipe")

    try_cases(read, json.dumps(recipe).encode(), 1000, empty, tally, "recipe", least_refused=0.3)
