"""`demo`: the whole pipeline on the embedded model, with nothing but the package index at hand.

The text is Python's own reference manual, which every Python carries (`pydoc_data`): seven of eight topics to calibrate
and train on, the eighth to measure on. So the numbers speak of that text and of a minute of training, no more.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from factorctl.checkpoint.aliases import DEMO
from factorctl.config.factorize import RECOMMENDED
from factorctl.errors import ResourceError
from factorctl.files.publishing import make_directory, sole_writer, write_file
from factorctl.models.loading import load, load_dense
from factorctl.pipeline.common.dense_source import find_source
from factorctl.pipeline.common.tokenizers import load_tokenizer
from factorctl.pipeline.recipe.read import Recipe, parse_recipe
from factorctl.pipeline.recipe.run import StageOutcome, run_recipe
from factorctl.processor import has_fast_bfloat16
from factorctl.progress import Progress, SilentProgress
from factorctl.reporting.statistics import Estimate

NAME = "demo"
HELD_OUT_EVERY = 8
PROMPT = "The with statement is used to"
SAMPLE_TOKENS = 40


@dataclass(frozen=True)
class Sample:
    """The same prompt continued greedily by both models."""

    prompt: str
    dense: str
    model: str


@dataclass(frozen=True)
class Speedup(Estimate):
    """dense / model in one phase of one regime, with the roofline's ceiling."""

    phase: str
    batch: int
    tokens: int
    ceiling: float


@dataclass(frozen=True)
class DemoResult:
    """What the five verbs found; the keys of `--format json`."""

    notation: str
    active_ffn_fraction: float
    identity_error: float
    ffn_flops_reduction: float
    total_flops_reduction: float
    speedups: list[Speedup]
    busy: bool
    """Whether something else was running while it was timed."""
    perplexity_dense: float
    perplexity_before: float
    perplexity_after: float
    trained_tokens: int
    accuracy_kept: float
    """Share of the dense model's next-token accuracy that is kept on text that was not trained on."""
    exports: dict[str, dict[str, Any]]
    """By target: path, engine, top1_agreement, max_logit_error."""
    checkpoint: str
    pictures: list[str]
    html: str
    sample: Sample
    stages: list[StageOutcome]
    seconds: float


def demo_recipe(texts: Path) -> Recipe:
    """The recipe, over the two files that `write_manual` makes.

    Training computes in bfloat16 where the processor does so itself: twice as fast there, far slower elsewhere.
    """
    precision = "bfloat16" if has_fast_bfloat16() else "float32"
    train, held_out = str(texts / "train.jsonl"), str(texts / "held-out.jsonl")
    return parse_recipe(
        {
            "factorize": {
                "model": DEMO,
                "experts": RECOMMENDED.num_experts,
                "top-k": RECOMMENDED.top_k,
                "shared-fraction": RECOMMENDED.shared_fraction,
                "refit": True,
                "calibration": train,
                "calibration-tokens": 8192,
            },
            "finetune": {
                "tokens": 12_288,
                "precision": precision,
                "data": train,
                "block-length": 512,
                "heldout-tokens": 2048,
            },
            "eval": {"data": held_out, "data-tokens": 4096, "window": 512},
            "profile": {"data": held_out, "batch": 1, "prompt": 256, "rounds": 5, "seconds": 30.0},
            "export": [{"to": "hf"}, {"to": "gguf", "quant": "f16"}],
        },
        default_name=NAME,
        origin="the demo",
    )


def run_demo(workspace: Path, progress: Progress) -> DemoResult:
    """factorize, finetune, eval, profile and export the demo model; what an earlier run finished is reused.

    Raises:
        FactorctlError: what a stage raises; the same command goes on behind the stages that finished.
    """
    started = time.monotonic()
    texts = workspace / NAME / "text"
    write_manual(texts)
    run = run_recipe(demo_recipe(texts), workspace, progress)
    factorized, tuned, profiled = (run.result_of(stage) for stage in ("factorize", "finetune", "profile"))
    evaluated = run.result_of("eval")
    directory = workspace / NAME
    with progress.stage("Writing a sample"):
        sample = _sample(Path(tuned["checkpoint"]))
    accuracy = next(iter(evaluated["perplexity"].values()))
    return DemoResult(
        notation=tuned["notation"],
        active_ffn_fraction=factorized["active_ffn_fraction"],
        identity_error=factorized["identity_error"],
        ffn_flops_reduction=profiled["ffn_flops_reduction"],
        total_flops_reduction=profiled["total_flops_reduction"],
        speedups=[_speedup(row) for row in profiled["latency"]],
        busy=profiled["busy"],
        perplexity_dense=tuned["perplexity_dense"],
        perplexity_before=tuned["perplexity_before"],
        perplexity_after=tuned["perplexity_after"],
        trained_tokens=tuned["tokens"],
        accuracy_kept=accuracy["accuracy_kept"],
        exports={outcome.stage: _exported(outcome.result) for outcome in run.stages if "export" in outcome.stage},
        checkpoint=tuned["checkpoint"],
        pictures=[str(path) for path in sorted(directory.glob("*/*.png"))],
        html=str(directory / "profile" / "report.html"),
        sample=sample,
        stages=run.stages,
        seconds=round(time.monotonic() - started, 1),
    )


def write_manual(directory: Path) -> None:
    """Python's reference manual as train.jsonl and held-out.jsonl, a topic a line; files that are right are left.

    Raises:
        ResourceError: this Python was built without its documentation.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ResourceError(
            "this Python carries no manual (pydoc_data) to train the demo on",
            "give text of your own: factorctl factorize demo --calibration notes.txt",
        ) from error
    lines = [json.dumps({"id": name, "text": topics[name]}) + "\n" for name in sorted(topics)]
    held_out = [line for index, line in enumerate(lines) if index % HELD_OUT_EVERY == 0]
    train = [line for index, line in enumerate(lines) if index % HELD_OUT_EVERY]
    with sole_writer(directory, wait=True):
        make_directory(directory)
        for name, chosen in (("train.jsonl", train), ("held-out.jsonl", held_out)):
            content, path = "".join(chosen).encode(), directory / name
            if not path.is_file() or path.read_bytes() != content:
                write_file(path, content)


def _sample(checkpoint: Path) -> Sample:
    source = find_source(DEMO, SilentProgress())
    tokenizer = load_tokenizer(source.path, hint="remove the cached model, and run `factorctl demo` again")
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    continued = []
    for model in (load_dense(source.path), load(checkpoint, verify=False)):
        with torch.inference_mode():
            written = model.generate(ids, max_new_tokens=SAMPLE_TOKENS, do_sample=False)  # type: ignore[operator]
        continued.append(str(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)))
    return Sample(PROMPT, *continued)


def _speedup(row: dict[str, Any]) -> Speedup:
    return Speedup(**row["speedup"], **{key: row[key] for key in ("phase", "batch", "tokens", "ceiling")})


def _exported(result: dict[str, Any]) -> dict[str, Any]:
    return {key: result[key] for key in ("path", "engine", "top1_agreement", "max_logit_error", "bytes")}
