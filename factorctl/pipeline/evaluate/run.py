"""`eval`: a checkpoint and its dense source measured in the same run, beside the controls that routing has to beat."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from factorctl.config.evaluate import EvalConfig
from factorctl.errors import ResourceError
from factorctl.evaluation.fidelity import draw_fidelity
from factorctl.evaluation.perplexity import PerplexityComparison, TextScore, by_domain, compare_text
from factorctl.files.publishing import make_directory, sole_writer_of, write_file
from factorctl.memory import peak_memory
from factorctl.pipeline.common.provenance import library_versions
from factorctl.pipeline.evaluate.controls import CONTROLS
from factorctl.pipeline.evaluate.measure import Measured, active_share, measure_subject
from factorctl.pipeline.evaluate.parts import PartStore
from factorctl.pipeline.evaluate.plan import EvalPlan, plan_evaluation, resolved_config
from factorctl.pipeline.evaluate.report import markdown
from factorctl.pipeline.evaluate.result import RESULTS_NAME, EvalResult, MethodRow, PromptFlops
from factorctl.profiling.flops import count_flops
from factorctl.profiling.sizes import ModelSizes
from factorctl.progress import Progress
from factorctl.reporting.hardware import look_at_hardware

if TYPE_CHECKING:
    from factorctl.evaluation.tasks import TaskComparison

PARTS_NAME = "parts"
PLOT_NAME = "fidelity.png"


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
    with sole_writer_of(plan.out, config.samples, config.report), _saying_what_is_kept(store):
        measured = {subject: measure_subject(plan, subject, store, counts, progress) for subject in plan.subjects}
        result = _result(plan, measured, command=command, seconds=time.monotonic() - started, parts=counts)
        write_outputs(plan, measured, result, store)
    for remark in result.remarks:
        progress.note(remark)
    return result


@contextmanager
def _saying_what_is_kept(store: PartStore) -> Iterator[None]:
    """Where the run is cut short, how to go on from what it has finished."""
    try:
        yield
    except (KeyboardInterrupt, ResourceError):
        if store.kept and not store.resume:
            store.progress.note("the same command with --resume reuses the measurements that are finished")
        raise


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
        name: method_row(plan, CONTROLS[name].title, measured[name], dense, reference=CONTROLS[name].reference)
        for name in plan.controls
    }
    ours = method_row(plan, "this model", model, dense)
    return EvalResult(
        checkpoint=str(plan.model.path),
        source=plan.reference.id,
        notation=None if manifest is None else str(manifest.factored["notation"]),
        active_ffn_fraction=active_share(plan),
        routing=_routing(plan),
        manifest_sha256=None if manifest is None else manifest.sha256,
        perplexity={text.name: _compared(plan, model.texts[text.name], dense.texts[text.name]) for text in plan.texts},
        domains=compare_domains(plan, model, dense),
        tasks={name: {**asdict(found), "few_shot": model.tasks[name].few_shot} for name, found in compared.items()},
        average={"kept": ours.kept, "kept_above_chance": ours.kept_above_chance},
        dense=method_row(plan, "dense", dense, dense),
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
        peak_rss_bytes=peak_memory(),
        parts=parts,
    )


def _compared(plan: EvalPlan, model: TextScore, dense: TextScore) -> PerplexityComparison:
    return compare_text(model, dense, window=plan.window, stride=plan.stride, seed=plan.config.seed)


def compare_domains(plan: EvalPlan, model: Measured, dense: Measured) -> dict[str, dict[str, PerplexityComparison]]:
    """Every text's domains, the model beside dense; texts that name none are left out."""
    found = {}
    for text in plan.texts:
        ours, theirs = (by_domain(text.documents, one.texts[text.name]) for one in (model, dense))
        if ours:
            found[text.name] = {domain: _compared(plan, ours[domain], theirs[domain]) for domain in sorted(ours)}
    return found


def compare_tasks(model: Measured, dense: Measured) -> dict[str, TaskComparison]:
    """Every task's answers paired with the dense model's."""
    if not model.tasks:
        return {}
    from factorctl.evaluation.tasks import compare_scores

    return {name: compare_scores(scores, dense.tasks[name]) for name, scores in model.tasks.items()}


def method_row(
    plan: EvalPlan, title: str, found: Measured, dense: Measured, *, reference: str | None = None
) -> MethodRow:
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
        domains={
            text.name: {domain: score.perplexity for domain, score in cut.items()}
            for text in plan.texts
            if (cut := by_domain(text.documents, found.texts[text.name]))
        },
        tasks=scores,
        task_average=sum(scores.values()) / len(scores) if scores else None,
        kept=kept,
        kept_above_chance=kept_above_chance,
        gflops=prompt_flops(plan, found),
        reference=reference,
    )


def prompt_flops(plan: EvalPlan, found: Measured) -> PromptFlops | None:
    """What a prompt of one window takes with the neurons that were active; routers are counted in `ffn`."""
    native, share = plan.model.native, found.active_share
    if native is None or share is None:
        return None
    sizes = ModelSizes.of(native.dense.config, native.spec.shape)
    dense = count_flops(sizes.dense, plan.window)
    router = count_flops(sizes, plan.window).router if share < 1 else 0.0
    return PromptFlops(plan.window, dense.attention / 1e9, (dense.ffn * share + router) / 1e9)


def _routing(plan: EvalPlan) -> str | None:
    native = plan.model.native
    if native is None or not native.spec.shape.routes:
        return None
    return "token" if native.spec.domains is None else "domain"


def _task_versions(model: Measured) -> dict[str, str]:
    from importlib.metadata import version

    return {"lm-eval": version("lm-eval")} if model.tasks else {}


def write_outputs(plan: EvalPlan, measured: Mapping[str, Measured], result: EvalResult, store: PartStore) -> None:
    """results.json, the answers, the picture, and the Markdown report where it was asked for."""
    make_directory(plan.out)
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
        make_directory(report.parent)
        write_file(report, markdown(result).encode())
    content = json.dumps(asdict(result), indent=2, ensure_ascii=False, allow_nan=False)  # in the order of the tables
    write_file(plan.out / RESULTS_NAME, f"{content}\n".encode())


def _write_answers(plan: EvalPlan, measured: Mapping[str, Measured], store: PartStore) -> Iterable[Path]:
    directory = plan.config.samples or plan.out
    for subject in measured:
        for part in plan.parts(subject):
            if part.measure == "task":
                make_directory(directory)
                path = directory / f"samples_{part.name}_{subject}.jsonl"
                write_file(path, store.path_of(part, ".jsonl").read_bytes())
                yield path


def _picture(plan: EvalPlan, result: EvalResult) -> bytes:
    assert plan.model.native is not None
    shape = plan.model.native.spec.shape
    routed = shape.routes
    title = f"{plan.model.path.name} ({shape.notation})"
    return draw_fidelity(result.fidelity, title=title, chance=shape.top_k / shape.num_experts if routed else None)
