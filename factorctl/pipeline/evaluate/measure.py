"""Measuring one model: loaded once, every text and task that is still to be done, each result kept at once."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from factorctl.evaluation.fidelity import LayerFidelity, measure_fidelity
from factorctl.evaluation.perplexity import DocumentLoss, TextScore, score_text
from factorctl.files.hashing import hash_file
from factorctl.files.publishing import make_directory
from factorctl.models.domains import domains_of
from factorctl.pipeline.evaluate.controls import CONTROLS, ControlKit, Runner, dense_ffns
from factorctl.pipeline.evaluate.parts import Measurement, PartStore
from factorctl.pipeline.evaluate.plan import EvalPlan
from factorctl.pipeline.evaluate.texts import fidelity_ids
from factorctl.progress import Progress

if TYPE_CHECKING:
    from factorctl.evaluation.tasks import TaskScores


@dataclass
class Measured:
    """What was found of one model."""

    texts: dict[str, TextScore] = field(default_factory=dict)
    tasks: dict[str, TaskScores] = field(default_factory=dict)
    fidelity: list[LayerFidelity] = field(default_factory=list)
    active_shares: list[float] = field(default_factory=list)

    @property
    def active_share(self) -> float | None:
        return sum(self.active_shares) / len(self.active_shares) if self.active_shares else None


def measure_subject(
    plan: EvalPlan, subject: str, store: PartStore, counts: dict[str, int], progress: Progress
) -> Measured:
    """All measurements of one model; it is loaded only where one of them is still to be done."""
    results = [(part, _stored(store, part)) for part in plan.parts(subject)]
    waiting = [part for part, result in results if result is None]
    counts["reused"] += len(results) - len(waiting)
    counts["computed"] += len(waiting)
    computed: dict[str, dict[str, Any]] = {}
    if waiting:
        title = CONTROLS[subject].title if subject in CONTROLS else subject
        with progress.stage(f"Measuring {title}", total=len(waiting), unit="parts") as task:
            with ready(plan, subject, progress) as runner:
                for part in waiting:
                    computed[part.stem] = compute(plan, part, runner, store, progress)
                    task.advance()
            del runner
        _release_memory()
    measured = Measured()
    for part, result in results:
        _add(measured, part, computed[part.stem] if result is None else result, store)
    return measured


@contextmanager
def ready(plan: EvalPlan, subject: str, progress: Progress) -> Iterator[Runner]:
    """The model behind a name, in memory while the block runs."""
    kit = ControlKit(plan.config, plan.model, plan.reference, plan.tokenizer, plan.dtype, plan.device, progress)
    if subject in CONTROLS:
        with CONTROLS[subject].make(kit) as runner:
            yield runner
        return
    model, share = (plan.reference, 1.0) if subject == "dense" else (plan.model, active_share(plan))
    loaded = kit.load(model)
    domains = domains_of(loaded)
    yield Runner(loaded, lambda: share, name_rows=domains.name_rows if domains is not None else lambda _: None)


def active_share(plan: EvalPlan) -> float | None:
    """What the model's manifest says of its active FFN neurons; None where there is no manifest."""
    manifest = plan.model.manifest
    return None if manifest is None else float(manifest.factored["active_ffn_fraction"])


def compute(plan: EvalPlan, part: Measurement, runner: Runner, store: PartStore, progress: Progress) -> dict[str, Any]:
    """Do one measurement and keep its result."""
    runner.restart()
    measures: Mapping[str, Callable[[], dict[str, Any]]] = {
        "perplexity": lambda: _perplexity(plan, part, runner, progress),
        "task": lambda: _task(plan, part, runner, store, progress),
        "fidelity": lambda: _fidelity(plan, part, runner, progress),
    }
    result = {**measures[part.measure](), "active_ffn_fraction": runner.active_share()}
    store.keep(part, result)
    return result


def _perplexity(plan: EvalPlan, part: Measurement, runner: Runner, progress: Progress) -> dict[str, Any]:
    text = next(text for text in plan.texts if text.name == part.name)
    title = f"Perplexity on {Path(text.name).name}"
    score = score_text(
        runner.model,
        text.documents,
        window=plan.window,
        stride=plan.stride,
        progress=progress,
        title=title,
        name_rows=runner.name_rows,
    )
    return {"documents": [asdict(document) for document in score.documents]}


def _task(plan: EvalPlan, part: Measurement, runner: Runner, store: PartStore, progress: Progress) -> dict[str, Any]:
    from factorctl.evaluation.tasks import score_tasks, write_samples

    config = plan.config
    scores = score_tasks(
        runner.model,
        plan.tokenizer,
        next(task for task in plan.tasks if task.name == part.name),
        limit=config.limit,
        few_shot=config.few_shot,
        batch_size=config.batch_size,
        seed=config.seed,
        progress=progress,
    )
    answers = store.path_of(part, ".jsonl")
    make_directory(answers.parent)
    write_samples(answers, scores)
    return {"answers_sha256": hash_file(answers).sha256}


def _fidelity(plan: EvalPlan, part: Measurement, runner: Runner, progress: Progress) -> dict[str, Any]:
    text = next(text for text in plan.texts if text.name == part.name)
    teacher_of = dense_ffns(plan.reference, plan.dtype, plan.device)
    layers = measure_fidelity(runner.model, fidelity_ids(text, plan.window), teacher_of, progress)
    return {"layers": [asdict(layer) for layer in layers]}


def _stored(store: PartStore, part: Measurement) -> dict[str, Any] | None:
    """A finished part; a task's also needs the file of its answers, unchanged."""
    result = store.find(part)
    if result is None or part.measure != "task":
        return result
    answers = store.path_of(part, ".jsonl")
    if answers.is_file() and hash_file(answers).sha256 == result.get("answers_sha256"):
        return result
    store.progress.note(f"{answers.name} is not what was written; {part.name} of {part.subject} is computed again")
    return None


def _add(measured: Measured, part: Measurement, result: Mapping[str, Any], store: PartStore) -> None:
    if result["active_ffn_fraction"] is not None:
        measured.active_shares.append(result["active_ffn_fraction"])
    if part.measure == "perplexity":
        measured.texts[part.name] = TextScore([DocumentLoss(**document) for document in result["documents"]])
    elif part.measure == "fidelity":
        measured.fidelity = [LayerFidelity(**layer) for layer in result["layers"]]
    else:
        from factorctl.evaluation.tasks import read_samples

        measured.tasks[part.name] = read_samples(store.path_of(part, ".jsonl"))


def _release_memory() -> None:
    """Before the next model is loaded: modules hold one another in circles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
