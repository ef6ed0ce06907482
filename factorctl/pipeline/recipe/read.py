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

Tables are named as the commands, keys as their options. Values are checked against the fields of the stage's config,
so that the file knows every option that the command line knows, and no other.
"""

from __future__ import annotations

import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from factorctl.config.evaluate import EvalConfig
from factorctl.config.export import ExportConfig
from factorctl.config.factorize import FactorizeConfig
from factorctl.config.finetune import FinetuneConfig
from factorctl.config.profile import ProfileConfig
from factorctl.errors import UsageError, did_you_mean
from factorctl.quantities import parse_token_count

StageName = Literal["factorize", "finetune", "eval", "profile", "export"]
StageConfig = FactorizeConfig | FinetuneConfig | EvalConfig | ProfileConfig | ExportConfig


@dataclass(frozen=True)
class StageKind:
    """How the keys of one table become fields of one config."""

    config: type[StageConfig]
    spelled: Mapping[str, str]
    """Field -> option, where the two are not the same word."""
    placed: frozenset[str]
    """Fields that the runner sets: where things come from and go to."""

    @property
    def options(self) -> dict[str, str]:
        """Option -> field."""
        names = [field.name for field in fields(self.config) if field.name not in self.placed]
        return {self.spelled.get(name, name).replace("_", "-"): name for name in names}


_PLACES = frozenset({"out", "workspace", "overwrite", "resume", "checkpoint"})
STAGES: Mapping[StageName, StageKind] = {
    "factorize": StageKind(FactorizeConfig, {"num_experts": "experts", "strategy_options": "option"}, _PLACES),
    "finetune": StageKind(FinetuneConfig, {"loss_weights": "loss"}, _PLACES | {"save_every"}),
    "eval": StageKind(EvalConfig, {}, _PLACES | {"samples", "report"}),
    "profile": StageKind(ProfileConfig, {}, _PLACES | {"html", "plots"}),
    "export": StageKind(ExportConfig, {"target": "to", "max_shard_bytes": "max-shard-bytes"}, _PLACES),
}
_COMMON = ("seed", "device", "dtype")


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
        raise UsageError(f"{path} is no TOML: {error}") from error
    return parse_recipe(content, default_name=path.stem, origin=str(path))


def parse_recipe(content: Mapping[str, Any], *, default_name: str, origin: str) -> Recipe:
    """The recipe that a parsed TOML document describes."""
    known = {*STAGES, *_COMMON, "name"}
    for key in content:
        if key not in known:
            raise UsageError(f"{origin}: '{key}' is no part of a recipe", did_you_mean(key, known))
    name = content.get("name", default_name)
    if not isinstance(name, str) or not name or Path(name).name != name or name.startswith("."):
        raise UsageError(f"{origin}: name = {name!r} is no name for a directory", 'write for example name = "demo"')
    if "factorize" not in content:
        raise UsageError(f"{origin} has no [factorize] table", 'add one with model = "demo"')
    common = {key: content[key] for key in _COMMON if key in content}
    stages = [stage for kind in STAGES if kind in content for stage in _stages_of(kind, content[kind], common, origin)]
    labels = [stage.label for stage in stages]
    repeated = next((label for label in labels if labels.count(label) > 1), None)
    if repeated is not None:
        raise UsageError(f"{origin} asks for {repeated} twice", "leave one of them out, or give them other options")
    return Recipe(name, tuple(stages))


def _stages_of(name: StageName, content: Any, common: Mapping[str, Any], origin: str) -> list[Stage]:
    """One stage, or one per table where `[[export]]` is repeated."""
    tables = content if isinstance(content, list) and name == "export" else [content]
    stages = []
    for table in tables:
        if not isinstance(table, Mapping):
            raise UsageError(f"{origin}: '{name}' must be a table", f"write [{name}] and its options below it")
        config = _config_of(name, {**common, **table}, origin)
        stages.append(Stage(name, _label(config) if name == "export" else name, config))
    return stages


def _label(config: StageConfig) -> str:
    """export-gguf-q8_0: what tells one export from another."""
    assert isinstance(config, ExportConfig)
    quant = [] if config.quant == "auto" else [config.quant]
    return "-".join(["export", config.target, *quant])


def _config_of(name: StageName, table: Mapping[str, Any], origin: str) -> StageConfig:
    kind = STAGES[name]
    hints, options = typing.get_type_hints(kind.config), kind.options
    values: dict[str, Any] = {}
    for key, value in table.items():
        field = options.get(key.replace("_", "-"))
        if field is None:
            raise UsageError(f"{origin}: [{name}] knows no '{key}'", did_you_mean(key, options))
        values[field] = _coerced(value, hints[field], f"{origin}: [{name}] {key}")
    needed = [f.name for f in fields(kind.config) if f.default is f.default_factory and f.name not in values]
    if needed:
        missing = ", ".join(option for option, field in options.items() if field in needed)
        raise UsageError(f"{origin}: [{name}] needs {missing}")
    return kind.config(**values)


def _coerced(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type that a config field declares.

    Raises:
        UsageError: it is none, naming what the field takes.
    """
    origin, choices = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value in choices:
            return value
        raise UsageError(f"{where} = {value!r} is none of its values", did_you_mean(str(value), map(str, choices)))
    if origin in (typing.Union, types.UnionType):
        return _first_that_fits(value, [choice for choice in choices if choice is not type(None)], where)
    if origin is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(_coerced(item, choices[0], where) for item in items)
    if origin is not None and isinstance(value, Mapping):
        as_text = choices[1] is str  # a strategy reads its options itself, as from the command line
        return {
            key: str(item) if as_text else _coerced(item, choices[1], f"{where}.{key}") for key, item in value.items()
        }
    if hint is int and isinstance(value, str):
        return parse_token_count(value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value).expanduser()
    if isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    wanted = "a table" if origin is not None else {int: "a whole number", str: "text"}.get(hint, hint.__name__)
    raise UsageError(f"{where} = {value!r} is not {wanted}")


def _first_that_fits(value: Any, hints: list[Any], where: str) -> Any:
    for hint in hints[:-1]:
        try:
            return _coerced(value, hint, where)
        except UsageError:
            continue
    return _coerced(value, hints[-1], where)
