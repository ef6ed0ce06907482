"""Recipes: the staged pipeline in one TOML file.

    name = "demo"                 # results go to WORKSPACE/demo; default: the file's name
    seed = 0                      # as are device and dtype, for every stage that does not set its own

    [factorize]
    model = "demo"
    experts = 8
    shared-fraction = 0.25

    [finetune]
    tokens = "60K"

    [eval]
    [profile]

    [[export]]
    to = "gguf"

Tables are named as the commands, keys as their options, and values are TOML's own or the text that the command line
takes: the file knows every option that the command line knows, but for places, which are the runner's business.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from factorctl.config.common import CommonConfig
from factorctl.config.evaluate import EvalConfig
from factorctl.config.export import ExportConfig
from factorctl.config.factorize import FactorizeConfig
from factorctl.config.finetune import FinetuneConfig
from factorctl.config.option import from_table, options_of
from factorctl.config.profile import ProfileConfig
from factorctl.errors import UsageError, did_you_mean, together

StageName = Literal["factorize", "finetune", "eval", "profile", "export"]
StageConfig = FactorizeConfig | FinetuneConfig | EvalConfig | ProfileConfig | ExportConfig


STAGES: Mapping[StageName, type[StageConfig]] = {
    "factorize": FactorizeConfig,
    "finetune": FinetuneConfig,
    "eval": EvalConfig,
    "profile": ProfileConfig,
    "export": ExportConfig,
}
_COMMON = [option.key for option in options_of(CommonConfig) if option.option.role != "place"]
"""What a recipe may say above its tables."""


@dataclass(frozen=True)
class Stage:
    """One stage to run; `label` is its name, with the target behind it where several exports are made."""

    name: StageName
    label: str
    config: StageConfig


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: its stages in the order in which they run."""

    name: str
    stages: tuple[Stage, ...]


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe file.

    Raises:
        UsageError: no such file, no TOML, or a table, key or value that no stage knows.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror}", "name a recipe file: factorctl run recipe.toml"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} is no TOML: {error}", "a recipe has a table for each stage, [factorize] first: docs/recipes.md"
        ) from error
    return parse_recipe(content, default_name=path.stem, origin=str(path))


def parse_recipe(content: Mapping[str, Any], *, default_name: str, origin: str) -> Recipe:
    """The recipe that a parsed TOML document describes."""
    known = {*STAGES, *_COMMON, "name"}
    for key in content:
        if key not in known:
            raise UsageError(f"{origin}: '{key}' is no part of a recipe", did_you_mean(key, known))
    title = content.get("name", default_name)
    if not isinstance(title, str) or not title or Path(title).name != title or title.startswith("."):
        raise UsageError(f"{origin}: name = {title!r} is no name for a directory", 'write for example name = "demo"')
    if "factorize" not in content:
        raise UsageError(f"{origin} has no [factorize] table", 'add one with model = "demo"')
    stages = _stages(content, origin)
    labels = [stage.label for stage in stages]
    repeated = next((label for label in labels if labels.count(label) > 1), None)
    if repeated is not None:
        raise UsageError(f"{origin} asks for {repeated} twice", "leave one of them out, or give them other options")
    return Recipe(title, tuple(stages))


def _stages(content: Mapping[str, Any], origin: str) -> list[Stage]:
    """Every stage in the order of the pipeline; what is wrong in any of their tables is told together."""
    common = {key: content[key] for key in _COMMON if key in content}
    from_table(CommonConfig, common, f"{origin}:")  # what is wrong here would be wrong in every stage
    stages, faults = [], []
    for name in (stage for stage in STAGES if stage in content):
        for table in _tables_of(name, content[name]):
            try:
                stages.append(_stage(name, table, common, origin))
            except UsageError as fault:
                faults.append(fault)
    if faults:
        raise together(faults)
    return stages


def _tables_of(name: StageName, content: Any) -> list[Any]:
    """One table, or several where `[[export]]` is repeated."""
    return content if isinstance(content, list) and name == "export" else [content]


def _stage(name: StageName, table: Any, common: Mapping[str, Any], origin: str) -> Stage:
    if not isinstance(table, Mapping):
        raise UsageError(f"{origin}: '{name}' must be a table", f"write [{name}] and its options below it")
    config = from_table(STAGES[name], {**common, **table}, f"{origin}: [{name}]")
    return Stage(name, _label(config) if name == "export" else name, config)


def _label(config: StageConfig) -> str:
    """export-gguf-q8_0: what tells one export from another."""
    assert isinstance(config, ExportConfig)
    quant = [] if config.quant == "auto" else [config.quant]
    return "-".join(["export", config.target, *quant])
