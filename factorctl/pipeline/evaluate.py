"""`eval`: a checkpoint and its dense source measured in the same run, beside the controls that routing has to beat."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from factorctl.checkpoint.hashing import hash_file
from factorctl.checkpoint.publishing import writable, write_file
from factorctl.config import EvalConfig
from factorctl.evaluation.fidelity import LayerFidelity, measure_fidelity
from factorctl.evaluation.fidelity_plot import draw_fidelity
from factorctl.evaluation.perplexity import DocumentLoss, TextScore, compare_text, score_text
from factorctl.pipeline.controls import CONTROLS, ControlKit, Runner, dense_ffns
from factorctl.pipeline.evaluate_plan import EvalPlan, fidelity_ids, plan_evaluation, resolved_config
from factorctl.pipeline.evaluate_report import markdown
from factorctl.pipeline.evaluate_result import EvalResult, MethodRow
from factorctl.pipeline.evaluate_store import Part, PartStore
from factorctl.pipeline.provenance import library_versions, peak_rss_bytes
from factorctl.profiling.hardware import look_at_hardware
from factorctl.progress import Progress

if TYPE_CHECKING:
    from factorctl.evaluation.tasks import TaskComparison, TaskScores

RESULTS_NAME = "results.json"
PARTS_NAME = "parts"
PLOT_NAME = "fidelity.png"


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


def evaluate(config: EvalConfig, progress: Progress, *, command: str | None = None) -> EvalResult:
    """Measure a checkpoint, its dense source and the controls, and write the report.

    1. Find, verify and compare the two models; read texts and tasks.
    2. One model after the other: load it, measure what an earlier run has not finished, keep each part.
    3. Pair the model's and every control's answers with the dense model's.
    4. Write results, answers, picture and report.

    Args:
        command: the command line, for the report.

    Raises:
        FactorctlError: with what is wrong; finished parts are kept for `--resume`.
    """
    started = time.monotonic()
    plan = plan_evaluation(config, progress)
    store = PartStore(plan.out / PARTS_NAME, config.resume, progress)
    counts = {"computed": 0, "reused": 0}
    measured = {subject: measure_subject(plan, subject, store, counts, progress) for subject in plan.subjects}
    result = _result(plan, measured, command=command, seconds=time.monotonic() - started, parts=counts)
    write_outputs(plan, measured, result, store)
    for remark in result.remarks:
        progress.note(remark)
    return result


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
    kit = ControlKit(plan.config, plan.model, plan.reference, plan.dtype, plan.device, progress)
    if subject in CONTROLS:
        with CONTROLS[subject].make(kit) as runner:
            yield runner
        return
    model, share = (plan.reference, 1.0) if subject == "dense" else (plan.model, active_share(plan))
    yield Runner(kit.load(model), lambda: share)


def active_share(plan: EvalPlan) -> float | None:
    """What the model's manifest says of its active FFN neurons; None where there is no manifest."""
    manifest = plan.model.manifest
    return None if manifest is None else float(manifest.factored["active_ffn_fraction"])


def compute(plan: EvalPlan, part: Part, runner: Runner, store: PartStore, progress: Progress) -> dict[str, Any]:
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


def _perplexity(plan: EvalPlan, part: Part, runner: Runner, progress: Progress) -> dict[str, Any]:
    text = next(text for text in plan.texts if text.name == part.name)
    title = f"Perplexity on {Path(text.name).name}"
    score = score_text(
        runner.model, text.documents, window=plan.window, stride=plan.stride, progress=progress, title=title
    )
    return {"documents": [asdict(document) for document in score.documents]}


def _task(plan: EvalPlan, part: Part, runner: Runner, store: PartStore, progress: Progress) -> dict[str, Any]:
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
    answers.parent.mkdir(parents=True, exist_ok=True)
    write_samples(answers, scores)
    return {"answers_sha256": hash_file(answers).sha256}


def _fidelity(plan: EvalPlan, part: Part, runner: Runner, progress: Progress) -> dict[str, Any]:
    text = next(text for text in plan.texts if text.name == part.name)
    teacher_of = dense_ffns(plan.reference, plan.dtype, plan.device)
    layers = measure_fidelity(runner.model, fidelity_ids(text, plan.window), teacher_of, progress)
    return {"layers": [asdict(layer) for layer in layers]}


def _stored(store: PartStore, part: Part) -> dict[str, Any] | None:
    """A finished part; a task's also needs the file of its answers, unchanged."""
    result = store.find(part)
    if result is None or part.measure != "task":
        return result
    answers = store.path_of(part, ".jsonl")
    if answers.is_file() and hash_file(answers).sha256 == result.get("answers_sha256"):
        return result
    store.progress.note(f"{answers.name} is not what was written; {part.name} of {part.subject} is computed again")
    return None


def _add(measured: Measured, part: Part, result: Mapping[str, Any], store: PartStore) -> None:
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


def _result(
    plan: EvalPlan,
    measured: Mapping[str, Measured],
    *,
    command: str | None,
    seconds: float,
    parts: dict[str, int],
) -> EvalResult:
    dense, model, config = measured["dense"], measured["model"], plan.config
    compared = compare_tasks(model, dense)
    manifest = plan.model.manifest
    rows = {
        name: method_row(CONTROLS[name].title, measured[name], dense, reference=CONTROLS[name].reference)
        for name in plan.controls
    }
    ours = method_row("this model", model, dense)
    return EvalResult(
        checkpoint=str(plan.model.path),
        source=plan.reference.id,
        notation=None if manifest is None else str(manifest.factored["notation"]),
        active_ffn_fraction=active_share(plan),
        manifest_sha256=None if manifest is None else manifest.sha256,
        perplexity={
            text.name: compare_text(
                model.texts[text.name],
                dense.texts[text.name],
                window=plan.window,
                stride=plan.stride,
                seed=config.seed,
            )
            for text in plan.texts
        },
        tasks={name: {**asdict(found), "few_shot": model.tasks[name].few_shot} for name, found in compared.items()},
        average={"kept": ours.kept, "kept_above_chance": ours.kept_above_chance},
        dense=method_row("dense", dense, dense),
        model=ours,
        controls=rows,
        fidelity=model.fidelity,
        hardware=look_at_hardware(plan.device, plan.dtype),
        versions=library_versions() | _task_versions(model),
        seed=config.seed,
        command=command,
        config=resolved_config(plan),
        remarks=list(plan.remarks),
        seconds=round(seconds, 1),
        peak_rss_bytes=peak_rss_bytes(),
        parts=parts,
    )


def compare_tasks(model: Measured, dense: Measured) -> dict[str, TaskComparison]:
    """Every task's answers paired with the dense model's."""
    if not model.tasks:
        return {}
    from factorctl.evaluation.tasks import compare_scores

    return {name: compare_scores(scores, dense.tasks[name]) for name, scores in model.tasks.items()}


def method_row(title: str, found: Measured, dense: Measured, *, reference: str | None = None) -> MethodRow:
    """One line of the table."""
    scores = {name: task.value for name, task in found.tasks.items()}
    kept = kept_above_chance = None
    if scores:
        from factorctl.evaluation.tasks import average_kept

        average = average_kept(compare_tasks(found, dense).values())
        kept, kept_above_chance = average.kept, average.kept_above_chance
    return MethodRow(
        title=title,
        active_ffn_fraction=found.active_share,
        perplexity={name: score.perplexity for name, score in found.texts.items()},
        tasks=scores,
        task_average=sum(scores.values()) / len(scores) if scores else None,
        kept=kept,
        kept_above_chance=kept_above_chance,
        reference=reference,
    )


def _task_versions(model: Measured) -> dict[str, str]:
    from importlib.metadata import version

    return {"lm-eval": version("lm-eval")} if model.tasks else {}


def write_outputs(plan: EvalPlan, measured: Mapping[str, Measured], result: EvalResult, store: PartStore) -> None:
    """results.json, the answers, the picture, and the Markdown report where it was asked for."""
    with writable(plan.out):
        plan.out.mkdir(parents=True, exist_ok=True)
    written = list(_write_answers(plan, measured, store))
    if result.fidelity:
        write_file(plan.out / PLOT_NAME, _picture(plan, result))
        written.append(plan.out / PLOT_NAME)
    report = plan.config.report
    if report is not None:
        written.append(report)
    written.append(plan.out / RESULTS_NAME)
    result.written.extend(map(str, written))
    if report is not None:
        with writable(report.parent):
            report.parent.mkdir(parents=True, exist_ok=True)
        write_file(report, markdown(result).encode())
    content = json.dumps(asdict(result), indent=2, ensure_ascii=False, allow_nan=False)  # in the order of the tables
    write_file(plan.out / RESULTS_NAME, f"{content}\n".encode())


def _write_answers(plan: EvalPlan, measured: Mapping[str, Measured], store: PartStore) -> Iterable[Path]:
    directory = plan.config.samples or plan.out
    for subject in measured:
        for part in plan.parts(subject):
            if part.measure == "task":
                with writable(directory):
                    directory.mkdir(parents=True, exist_ok=True)
                path = directory / f"samples_{part.name}_{subject}.jsonl"
                write_file(path, store.path_of(part, ".jsonl").read_bytes())
                yield path


def _picture(plan: EvalPlan, result: EvalResult) -> bytes:
    assert plan.model.native is not None
    shape = plan.model.native.spec.shape
    routed = 0 < shape.top_k < shape.num_experts
    title = f"{plan.model.path.name} ({shape.notation})"
    return draw_fidelity(result.fidelity, title=title, chance=shape.top_k / shape.num_experts if routed else None)
