"""`frontier`: a dense model in; out come what its splits cost and win, and a recipe for the one that is meant."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from factorctl import __version__
from factorctl.config.frontier import FrontierConfig
from factorctl.config.option import EVERY_ROLE, recorded
from factorctl.config.shape import FactorShape
from factorctl.errors import FactorctlError
from factorctl.files.hashing import hash_value
from factorctl.files.publishing import make_directory, sole_writer, writable, write_file
from factorctl.memory import peak_memory
from factorctl.pipeline.common.provenance import library_versions
from factorctl.pipeline.common.recorded_source import describe_source
from factorctl.pipeline.frontier.measure import Quality, dense_quality
from factorctl.pipeline.frontier.partitions import shared_pass
from factorctl.pipeline.frontier.picture import draw_frontier
from factorctl.pipeline.frontier.plan import FrontierPlan, plan_frontier
from factorctl.pipeline.frontier.points import Point, best, front, marked
from factorctl.pipeline.frontier.recipe import recipe_text
from factorctl.pipeline.frontier.result import FrontierResult, Promise, promise_lines, promise_of
from factorctl.pipeline.frontier.search import Search
from factorctl.pipeline.frontier.splits import name_of
from factorctl.pipeline.frontier.state import SearchState
from factorctl.pipeline.frontier.texts import SearchTexts, read_texts
from factorctl.progress import Progress
from factorctl.reporting.hardware import Hardware, look_at_hardware

PARTS_NAME, REPORT_NAME, PICTURE_NAME, RECIPE_NAME = ".parts", "frontier.json", "frontier.png", "recipe.toml"


def frontier(config: FrontierConfig, progress: Progress) -> FrontierResult:
    """Try splits, measure them, and choose.

    1. Resolve the source and lay out the splits, coarse to fine.
    2. Read calibration text and held-out text.
    3. Judge the dense model; partition it for every number of experts and of shared neurons, in one pass.
    4. Split by split: fit it on its own stream, judge it on held-out text, time it beside the dense model.
    5. Choose by the budgets; make and time the chosen one once more, as its recipe will. Mark the points that lose.
    6. Write report, picture and recipe.

    Raises:
        FactorctlError: with what is wrong, or that no split meets the budgets; finished points are kept, and the same
            command goes on behind them.
    """
    started = time.monotonic()
    plan = plan_frontier(config, progress)
    with sole_writer(plan.out):
        with progress.stage("Hashing the source"):
            description = describe_source(plan.source)
        texts = read_texts(plan, description, progress)
        hardware = look_at_hardware(plan.device, plan.dtype)
        state = SearchState(plan.out / PARTS_NAME, _fingerprint(plan, description, texts, hardware))
        dense = _dense(plan, texts, state, progress)
        shared = shared_pass(plan, plan.families, texts.calibration_BL, state, progress)
        deadline = float("inf") if config.time is None else started + config.time
        search = Search(plan, texts, shared, dense, state, deadline, progress)
        untried = search.run()
        promise, measured = _promise(plan, search) if config.has_budget else (None, search.points)
        points = marked(sorted(measured, key=lambda point: (point.active_ffn_fraction, point.name)), config.phase)
        result = FrontierResult(
            source=plan.source.id,
            dense_perplexity=dense.perplexity,
            dense_accuracy=dense.accuracy,
            heldout_text=texts.heldout_name,
            heldout_tokens=len(texts.stream),
            points=points,
            front=[point.name for point in front(points, config.phase)],
            chosen=promise,
            untried=[name_of(shape) for shape in untried],
            reused=search.reused,
            hardware=hardware,
            versions=library_versions(),
            config=recorded(config, *EVERY_ROLE),
            remarks=_remarks(plan, hardware, points, untried),
            seconds=round(time.monotonic() - started, 1),
            peak_rss_bytes=peak_memory(),
            written=[str(plan.out / name) for name in (REPORT_NAME, PICTURE_NAME, *([RECIPE_NAME] if promise else []))],
        )
        _write(plan, result)
        state.forget_others()
    if config.has_budget and promise is None:
        raise _none_meets(plan, points)
    for remark in result.remarks:
        progress.note(remark)
    return result


def _fingerprint(plan: FrontierPlan, description: Mapping[str, Any], texts: SearchTexts, hardware: Hardware) -> str:
    """Names what decides a point: everything but the budgets, the order and the time."""
    config = plan.config
    base = {key: value for key, value in recorded(plan.base.config).items() if key not in _NOT_OF_A_POINT}
    return hash_value(
        {
            "base": base,
            "source": description["files"],
            "strategy": asdict(plan.base.provenance),
            "texts": texts.fingerprint,
            "window": plan.window,
            "speed": [config.batch, config.prompt, config.rounds],
            "machine": [hardware.device, hardware.processor, hardware.threads, hardware.dtype, hardware.no_kernel],
            "libraries": library_versions(),
            "tool_version": __version__,
        }
    )


_NOT_OF_A_POINT = frozenset({"num_experts", "top_k", "shared_fraction", "model", "revision"})
"""What differs between points, or names the source, whose files are hashed."""


def _dense(plan: FrontierPlan, texts: SearchTexts, state: SearchState, progress: Progress) -> Quality:
    """The dense model on the held-out text."""
    found = state.found("dense")
    if found is None:
        found = asdict(dense_quality(plan, texts, progress))
        state.keep("dense", found)
    return Quality(**found)


def _promise(plan: FrontierPlan, search: Search) -> tuple[Promise | None, list[Point]]:
    """The point that is meant, as soon as one still meets the budgets when it is made and timed once more."""
    points = list(search.points)
    tried: set[str] = set()
    while (point := best(points, plan.config)) is not None and point.name not in tried:
        tried.add(point.name)
        again = search.confirmed(point)
        points[points.index(point)] = again
        if best([again], plan.config) is not None:
            return promise_of(again, plan.out / RECIPE_NAME), points
    return None, points


def _remarks(
    plan: FrontierPlan, hardware: Hardware, points: Sequence[Point], untried: Sequence[FactorShape]
) -> list[str]:
    remarks = list(plan.remarks)
    if hardware.busy:
        remarks.append(f"{hardware.busy_remark}; speeds are uncertain")
    if hardware.no_kernel:
        remarks.append(hardware.no_kernel_remark)
    if untried:
        remarks.append(
            f"no time was left for {', '.join(map(name_of, untried))}; the same command with more --time goes on there"
        )
    return remarks


def _write(plan: FrontierPlan, result: FrontierResult) -> None:
    """The report, the picture, and the recipe of the chosen point; a recipe of an earlier choice does not stay."""
    make_directory(plan.out)
    promise = result.chosen
    picture = draw_frontier(
        result.points,
        plan.config,
        chosen=None if promise is None else promise.point,
        title=f"{result.source}: what a split costs and wins",
        note=f"{result.heldout_tokens:,} held-out tokens; {result.hardware.device}, {result.hardware.threads} threads, "
        f"{result.hardware.dtype}",
    )
    write_file(plan.out / PICTURE_NAME, picture)
    if promise is None:
        with writable(plan.out / RECIPE_NAME):
            (plan.out / RECIPE_NAME).unlink(missing_ok=True)
    else:
        point = next(point for point in result.points if point.name == promise.point)
        write_file(plan.out / RECIPE_NAME, recipe_text(plan, point, promise_lines(result, promise)).encode())
    content = json.dumps(asdict(result), indent=2, ensure_ascii=False, allow_nan=False)
    write_file(plan.out / REPORT_NAME, f"{content}\n".encode())


def _none_meets(plan: FrontierPlan, points: Sequence[Point]) -> FactorctlError:
    """Nothing that was tried meets the budgets: how near it came."""
    config = plan.config
    measured = [point for point in points if point.measured]
    if not measured:
        return FactorctlError("no split was measured in the time given", "give more --time, or leave it out")
    fastest = max(measured, key=lambda point: point.speed_up(config.phase))
    truest = max(measured, key=lambda point: point.kept(config.keep_by))
    return FactorctlError(
        f"none of {len(measured)} splits meets {budgets_in_words(config)}: the fastest, {fastest.name}, is "
        f"{fastest.speed_up(config.phase):.2f}x in {config.phase}; the truest, {truest.name}, keeps "
        f"{truest.kept(config.keep_by):.1%} of the {config.keep_by}",
        f"ask for less, or look at {plan.out / REPORT_NAME} and {PICTURE_NAME} beside it; more is kept after finetune",
    )


def budgets_in_words(config: FrontierConfig) -> str:
    given = {"--speed-up": config.speed_up, "--active": config.active, "--keep": config.keep}
    return " and ".join(f"{option} {value:g}" for option, value in given.items() if value is not None)
