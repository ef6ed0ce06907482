"""What stands in for engines, pictures and stopwatches: they take seconds each, and write nothing of ours."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from factorctl.exporting.check import gguf_proof
from factorctl.exporting.gguf import writer as gguf_writer
from factorctl.exporting.jobs import Verified
from factorctl.exporting.stock.writer import SafetensorsWriter
from factorctl.files.publishing import write_file
from factorctl.pipeline.evaluate import run as evaluate_pipeline
from factorctl.pipeline.finetune import run as finetune_pipeline
from factorctl.pipeline.frontier import measure as frontier_measure
from factorctl.pipeline.frontier import run as frontier_pipeline
from factorctl.pipeline.profile import run as profile_pipeline
from factorctl.pipeline.recipe import demo as demo_pipeline
from factorctl.pipeline.recipe.run import RunResult, StageOutcome
from factorctl.pipeline.trial import transformers_engine
from factorctl.profiling.attribution import FfnCost
from factorctl.profiling.latency import Samples
from factorctl.profiling.roofline import Machine

OUT = "out"
"""The name that every run gives its result, so that no byte differs for its name."""
PICTURE = b"a picture"
STEPS = ((None, "masked"),)


@contextmanager
def without_engines() -> Iterator[None]:
    """No stock engine is started to compare an export, no picture is drawn, nothing is timed.

    `demo` finds its recipe done: its stages are those of `run`, and of another model.
    """
    with ExitStack() as patches:
        for patch in (
            mock.patch.object(SafetensorsWriter, "verify", return_value=Verified("nothing", None)),
            mock.patch.object(gguf_writer, "has_llama_cpp", return_value=False),
            mock.patch.object(gguf_proof, "has_llama_cpp", return_value=False),
            mock.patch.object(finetune_pipeline, "draw_training", _draw_training),
            mock.patch.object(evaluate_pipeline, "draw_fidelity", return_value=PICTURE),
            mock.patch.multiple(profile_pipeline, **PROFILE),
            mock.patch.object(transformers_engine, "synchronised_clock", return_value=lambda: 0.0),
            mock.patch.object(frontier_measure, "measure_regime", _samples),
            mock.patch.object(frontier_pipeline, "draw_frontier", return_value=PICTURE),
            mock.patch.multiple(demo_pipeline, NAME=OUT, run_recipe=_finished_run, _sample=_sample),
            mock.patch.object(os, "getloadavg", return_value=(0.0, 0.0, 0.0)),
            mock.patch.object(gc, "collect"),
        ):
            patches.enter_context(patch)
        yield


def _draw_training(run: Path, *_: object) -> Path:
    write_file(run / "training.png", PICTURE)
    return run / "training.png"


def _samples(variants: Mapping[Any, object], *_: object) -> dict[Any, Samples]:
    return {name: Samples([1.0, 1.0], [1.0, 1.0]) for name in variants}


PROFILE: dict[str, Any] = {
    "measure_machine": lambda *_: Machine(1e9, 1e9),
    "measure_regime": _samples,
    "ffn_cost": lambda *_: FfnCost(1, "masked", 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0),
    "time_paths": lambda *_: {1: {"masked": 1.0}},
    "steps_for": lambda *_: STEPS,  # whether an earlier run has tuned already does not show
    "draw": lambda _: {"flops": PICTURE},
}

_FOUND: dict[str, Any] = {
    "notation": "1R4E2K",
    "checkpoint": "",
    "active_ffn_fraction": 0.5,
    "identity_error": 0.0,
    "tokens": 1,
    "perplexity_dense": 1.0,
    "perplexity_before": 1.0,
    "perplexity_after": 1.0,
    "ffn_flops_reduction": 0.5,
    "total_flops_reduction": 0.5,
    "latency": [],
    "busy": False,
    "perplexity": {"held-out": {"accuracy_kept": 1.0}},
}


def _finished_run(*_: object) -> RunResult:
    stages = [StageOutcome(stage, "reused", "", 0.0, _FOUND) for stage in ("factorize", "finetune", "eval", "profile")]
    return RunResult(OUT, "", stages, 0.0)


def _sample(_: Path) -> demo_pipeline.Sample:
    return demo_pipeline.Sample("", "", "")
