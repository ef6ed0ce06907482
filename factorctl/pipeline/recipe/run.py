"""`run`: the stages of a recipe one after the other, redoing only what changed.

A stage is named by a key: the hash of its options, of the content of what it reads (the dense source, the text, the
artefact before it) and of the versions that compute it. The key and the hash of the result stand in `recipe.lock.json`
of the run's directory; where both still hold, the result is taken as it is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from factorctl import __version__
from factorctl.checkpoint.manifest import MANIFEST_NAME, check_files, is_artefact, read_manifest
from factorctl.config.evaluate import EvalConfig
from factorctl.config.export import ExportConfig
from factorctl.config.factorize import FactorizeConfig
from factorctl.config.finetune import FinetuneConfig
from factorctl.config.option import recorded
from factorctl.config.profile import ProfileConfig
from factorctl.data.hub import pin_revisions
from factorctl.data.identity import identify_sources
from factorctl.data.spec import DEFAULT_PRETRAINING_DATA, parse_data_spec
from factorctl.errors import IntegrityError, ResourceError
from factorctl.files.hashing import hash_file, hash_value
from factorctl.files.publishing import refuse_impossible_name, sole_writer, writable
from factorctl.pipeline.common.dense_source import find_source
from factorctl.pipeline.common.provenance import library_versions
from factorctl.pipeline.common.recorded_source import describe_source
from factorctl.pipeline.evaluate.result import RESULTS_NAME
from factorctl.pipeline.evaluate.run import evaluate
from factorctl.pipeline.export.run import export
from factorctl.pipeline.factorize.run import factorize
from factorctl.pipeline.finetune.plan import RUN_NAME, training_directory
from factorctl.pipeline.finetune.run import finetune
from factorctl.pipeline.profile.run import profile
from factorctl.pipeline.recipe.lock import LOCK_NAME, Place, RecipeLock, evidence_of
from factorctl.pipeline.recipe.read import Recipe, Stage, StageConfig
from factorctl.progress import Progress

Status = Literal["done", "reused", "would run", "would be reused"]
_DATA_FIELDS = ("calibration", "data")


@dataclass(frozen=True)
class StageOutcome:
    """What became of one stage."""

    stage: str
    status: Status
    output: str
    seconds: float
    result: dict[str, Any]
    """The stage's own `--format json`; empty where it has not run."""


@dataclass(frozen=True)
class RunResult:
    """`factorctl run`; the keys of `--format json`."""

    name: str
    directory: str
    stages: list[StageOutcome]
    seconds: float

    def result_of(self, stage: str) -> dict[str, Any]:
        return next(outcome.result for outcome in self.stages if outcome.stage == stage)


def run_recipe(recipe: Recipe, workspace: Path, progress: Progress, *, dry_run: bool = False) -> RunResult:
    """Run every stage whose result is not there already.

    Raises:
        UsageError: another process runs the same recipe.
        FactorctlError: what a stage raises; finished stages are kept, and the same command goes on behind them.
    """
    directory = workspace / recipe.name
    refuse_impossible_name(directory)
    with nullcontext() if dry_run else sole_writer(directory):
        return _run(recipe, directory, progress, dry_run=dry_run)


def _run(recipe: Recipe, directory: Path, progress: Progress, *, dry_run: bool) -> RunResult:
    started = time.monotonic()
    lock = RecipeLock(directory / LOCK_NAME)
    checkpoint: Place | None = None
    outcomes: list[StageOutcome] = []
    for stage in recipe.stages:
        place = _place_of(stage, directory)
        upstream = None if checkpoint is None else evidence_of(checkpoint)
        stale = any(outcome.status == "would run" for outcome in outcomes)
        key = None if stale else stage_key(stage.config, upstream, progress)
        if key is not None and lock.holds(stage.label, key, place) and _is_whole(place, progress):
            status: Status = "would be reused" if dry_run else "reused"
            outcomes.append(StageOutcome(stage.label, status, str(place.output), 0.0, lock.result(stage.label)))
        elif dry_run:
            outcomes.append(StageOutcome(stage.label, "would run", str(place.output), 0.0, {}))
        else:
            assert key is not None
            outcomes.append(_run_stage(stage, key, place, checkpoint, lock, progress))
        if stage.name in ("factorize", "finetune"):
            checkpoint = place
    return RunResult(recipe.name, str(directory), outcomes, round(time.monotonic() - started, 3))


def stage_key(config: StageConfig, upstream: str | None, progress: Progress) -> str:
    """The hash of everything that decides a stage's result."""
    return hash_value(
        {
            "kind": type(config).__name__,
            "options": recorded(config, "content", "effect"),
            "upstream": upstream,
            "source": _source_identity(config, progress),
            "text": [_text_identity(text, progress) for text in _texts(config)],
            "task_data": _folder_identity(getattr(config, "task_data", None)),
            "tool_version": __version__,
            "libraries": library_versions(),
        }
    )


def _source_identity(config: StageConfig, progress: Progress) -> dict[str, Any] | None:
    if not isinstance(config, FactorizeConfig):
        return None
    source = find_source(config.model, progress, revision=config.revision)
    with progress.stage("Hashing the source"):
        return dict(describe_source(source)["files"])


def _texts(config: StageConfig) -> list[str]:
    """Every DATA that the stage reads."""
    found: list[str] = []
    for name in _DATA_FIELDS:
        value = getattr(config, name, None)
        if name == "data" and value is None and isinstance(config, FinetuneConfig):
            value = DEFAULT_PRETRAINING_DATA
        found += [value] if isinstance(value, str) else list(value or ())
    return [text for text in found if text not in ("self", "random")]


def _text_identity(text: str, progress: Progress) -> list[dict[str, Any]]:
    """Hashes of the files, or the Hub commit where the Hub answers."""
    spec = parse_data_spec(text)
    try:
        spec = pin_revisions(spec)
    except ResourceError:  # without the Hub the dataset cannot have changed for this machine
        progress.note(f"the Hub cannot be asked for the revision of {text}: taken to be unchanged")
    return identify_sources(spec, None, progress)


def _folder_identity(folder: Path | None) -> dict[str, Any] | None:
    if folder is None:
        return None
    return {path.name: asdict(hash_file(path)) for path in sorted(folder.glob("*")) if path.is_file()}


def _place_of(stage: Stage, directory: Path) -> Place:
    output = directory / {"factorize": "factorized", "finetune": "finetuned"}.get(stage.label, stage.label)
    report = {"eval": RESULTS_NAME, "profile": "profile.json"}.get(stage.name, MANIFEST_NAME)
    return Place(output, output / report)


def _is_whole(place: Place, progress: Progress) -> bool:
    """Whether a result can be reused; of an artefact every file is read, of a report the evidence is all there is."""
    if not is_artefact(place.output):
        return True
    try:
        with progress.stage(f"Verifying {place.output.name}"):
            for _ in check_files(place.output, read_manifest(place.output)):
                pass
    except IntegrityError as error:
        progress.note(f"{error.message}; it is made again")
        return False
    return True


def _run_stage(
    stage: Stage, key: str, place: Place, checkpoint: Place | None, lock: RecipeLock, progress: Progress
) -> StageOutcome:
    progress.note(f"{stage.label}: {place.output}")
    begun_before = lock.begun(stage.label) == key
    if not begun_before:
        _forget_training(place)
    lock.begin(stage.label, key)
    started = time.monotonic()
    config = _placed(stage.config, place, None if checkpoint is None else checkpoint.output, begun_before)
    result = _recorded(asdict(_RUNNERS[type(config)](config, progress)))
    seconds = round(time.monotonic() - started, 3)
    lock.finish(stage.label, key, place, result)
    return StageOutcome(stage.label, "done", str(place.output), seconds, result)


def _forget_training(place: Place) -> None:
    """An earlier finetune with another key left its account there; a stage cut short later is not to go on from it."""
    with writable(training_directory(place.output)):
        (training_directory(place.output) / RUN_NAME).unlink(missing_ok=True)


def _recorded(result: dict[str, Any]) -> dict[str, Any]:
    """The result as plain JSON, without raw samples: those stand in the stage's own report."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items() if key != "samples_ms"}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        if isinstance(value, float) and not math.isfinite(value):
            return None
        return value if isinstance(value, str | int | float | bool | None) else str(value)

    return {key: plain(value) for key, value in result.items()}


_RUNNERS: Mapping[type, Callable[[Any, Progress], Any]] = {
    FactorizeConfig: factorize,
    FinetuneConfig: finetune,
    EvalConfig: evaluate,
    ProfileConfig: profile,
    ExportConfig: export,
}


def _placed(config: StageConfig, place: Place, checkpoint: Path | None, begun_before: bool) -> StageConfig:
    """The config with where things come from and go to; a stage of the same key that was cut short goes on."""
    out = place.output
    if isinstance(config, FactorizeConfig):
        return replace(config, out=out, overwrite=is_artefact(out))
    if isinstance(config, FinetuneConfig):
        unfinished = begun_before and (training_directory(out) / RUN_NAME).is_file()
        return replace(config, checkpoint=checkpoint, out=out, resume=unfinished, overwrite=True)
    if isinstance(config, EvalConfig):
        report = out / "eval.md"
        return replace(config, checkpoint=str(checkpoint), out=out, report=report, resume=begun_before)
    if isinstance(config, ProfileConfig):
        page = out / "report.html"
        return replace(config, checkpoint=checkpoint, out=place.evidence, html=page, plots=out)
    return replace(config, checkpoint=checkpoint, out=out, overwrite=is_artefact(out))
