"""Reading recipes: every option of every stage by its name, and a message for everything else."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main

from factorctl.cli.app import app
from factorctl.config.evaluate import EvalConfig
from factorctl.config.export import ExportConfig
from factorctl.config.factorize import FactorizeConfig
from factorctl.config.finetune import FinetuneConfig
from factorctl.config.option import options_of
from factorctl.config.profile import ProfileConfig
from factorctl.errors import UsageError
from factorctl.pipeline.recipe.read import STAGES, Recipe, parse_recipe, read_recipe

WHOLE = """
seed = 3
dtype = "float32"

[factorize]
model = "demo"
experts = 8
shared-fraction = 0.25
top_k = 3
calibration-tokens = "64K"
option = { by = "activations", rounds = 5 }

[finetune]
tokens = "40M"
seed = 4
lr = 1
loss = { kd = 1, par = 0.5 }
track = ["tensorboard"]

[eval]
data = "held-out.jsonl"
batch-size = "auto"

[profile]
batch = [1, 8]
latency = false

[[export]]

[[export]]
to = "gguf"
quant = "q8_0"
"""


def parsed(text: str) -> Recipe:
    return parse_recipe(tomllib.loads(text), default_name="mine", origin="recipe.toml")


def config(recipe: Recipe, label: str) -> Any:
    return next(stage.config for stage in recipe.stages if stage.label == label)


def test_a_whole_recipe() -> None:
    recipe = parsed(WHOLE)
    assert recipe.name == "mine"
    labels = [stage.label for stage in recipe.stages]
    assert labels == ["factorize", "finetune", "eval", "profile", "export-hf", "export-gguf-q8_0"]
    assert config(recipe, "factorize") == FactorizeConfig(
        model="demo",
        num_experts=8,
        shared_fraction=0.25,
        top_k=3,
        calibration_tokens=64_000,
        strategy_options={"by": "activations", "rounds": "5"},
        seed=3,
        dtype="float32",
    )
    assert config(recipe, "finetune") == FinetuneConfig(
        tokens=40_000_000,
        seed=4,
        lr=1.0,
        loss_weights={"kd": 1.0, "par": 0.5},
        track=("tensorboard",),
        dtype="float32",
    )
    assert config(recipe, "eval") == EvalConfig(data=("held-out.jsonl",), seed=3, dtype="float32")
    assert config(recipe, "profile") == ProfileConfig(batch=(1, 8), latency=False, seed=3, dtype="float32")
    assert config(recipe, "export-gguf-q8_0") == ExportConfig(target="gguf", quant="q8_0", seed=3, dtype="float32")


def test_stages_run_in_the_order_of_the_pipeline() -> None:
    recipe = parsed("[export]\n[finetune]\ntokens = 10\n[factorize]\nmodel = 'demo'\nexperts = 4\n")
    assert [stage.name for stage in recipe.stages] == ["factorize", "finetune", "export"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[factorise]\nmodel='demo'\n", "'factorise' is no part of a recipe"),
        ("[finetune]\ntokens=1\n", "has no [factorize] table"),
        ("[factorize]\nexperts=4\n", "[factorize] needs model"),
        ("[factorize]\nmodel='demo'\nexpert=4\n", "[factorize] knows no 'expert'"),
        ("[factorize]\nmodel='demo'\nexperts='four'\n", "experts 'four' is not a whole number"),
        ("[factorize]\nmodel='demo'\nexperts=4.5\n", "experts = 4.5 is not a whole number"),
        ("[factorize]\nmodel='demo'\nexperts=true\n", "experts = True is not a whole number"),
        ("[factorize]\nmodel=4\nexperts=4\n", "model = 4 is not text"),
        ("[factorize]\nmodel='demo'\nexperts=4\ngate='sharp'\n", "gate sharp is not known"),
        ("[factorize]\nmodel='demo'\nexperts=4\nrefit='yes'\n", "refit = 'yes' is not"),
        ("[factorize]\nmodel='demo'\nexperts=4\nout='x'\n", "[factorize] knows no 'out'"),
        ("[factorize]\nmodel='demo'\nexperts=4\n[finetune]\ntokens='many'\n", "'many' is not a number of tokens"),
        ("[factorize]\nmodel='demo'\nexperts=4\n[[export]]\n[[export]]\n", "asks for export-hf twice"),
        ("factorize='demo'\n", "'factorize' must be a table"),
        ("name='../up'\n[factorize]\nmodel='demo'\nexperts=4\n", "no name for a directory"),
    ],
)
def test_what_no_stage_knows_is_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError) as refused:
        parsed(text)
    assert words in refused.value.message
    assert "recipe.toml" in refused.value.message


def test_near_misses_are_named() -> None:
    for text, word in (("[factorise]\n", "factorize"), ("[factorize]\nexpert=4\n", "experts")):
        with pytest.raises(UsageError) as refused:
            parsed(text)
        assert f"did you mean '{word}'" in str(refused.value)


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_recipe(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("experts = = 4")
    with pytest.raises(UsageError, match=r"bad\.toml is no TOML"):
        read_recipe(tmp_path / "bad.toml")


@pytest.mark.parametrize("stage", list(STAGES))
def test_keys_are_the_options_of_the_command(stage: str) -> None:
    """What `factorctl STAGE --help` lists, a recipe takes under the same name, unless the runner itself decides it."""
    command = typer.main.get_command(app).commands[stage]  # type: ignore[attr-defined]
    named = {name for p in command.params for name in p.opts if name.startswith("--")}
    options = options_of(STAGES[stage])  # type: ignore[index]
    flags = {flag for o in options if not o.option.positional for flag in (o.option.flags or [o.flag])}
    assert named - flags <= {"--format", "--quiet", "--dry-run", "--compare", "--paper-table"}
    assert flags <= named
    places = {o.field for o in options if o.option.role == "place"}
    decided = {"out", "workspace", "overwrite", "resume", "checkpoint", "html", "plots", "samples", "report"}
    assert places == decided & {o.field for o in options}


DOCS = Path(__file__).parents[3] / "docs" / "recipes.md"


@pytest.mark.parametrize("block", range(4))
def test_the_recipes_of_the_docs_are_recipes(block: int) -> None:
    blocks = [part.split("```")[0] for part in DOCS.read_text().split("```toml\n")[1:]]
    assert len(blocks) == 4
    assert parsed(blocks[block]).stages


def test_the_demo_is_a_recipe(tmp_path: Path) -> None:
    from factorctl.pipeline.recipe.demo import demo_recipe, write_manual

    write_manual(tmp_path)
    train, held_out = ((tmp_path / name).read_text() for name in ("train.jsonl", "held-out.jsonl"))
    assert len(train) > 5 * len(held_out) > 100_000
    assert not set(train.splitlines()) & set(held_out.splitlines())
    labels = [stage.label for stage in demo_recipe(tmp_path).stages]
    assert labels == ["factorize", "finetune", "eval", "profile", "export-hf", "export-gguf-f16"]
