"""One task, one model: lm-eval's evaluator on the model in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from lm_eval.evaluator import evaluate
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from factorctl.errors import FactorctlError, UsageError
from factorctl.evaluation.tasks.harness_model import HarnessModel
from factorctl.evaluation.tasks.plans import TaskPlan
from factorctl.evaluation.tasks.quiet import quiet_libraries
from factorctl.evaluation.tasks.scores import DocumentAnswer, TaskScores
from factorctl.progress import Progress


def score_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: TaskPlan,
    *,
    limit: int | None,
    few_shot: int | None,
    batch_size: int | Literal["auto"],
    seed: int,
    progress: Progress,
) -> TaskScores:
    """Score `model` on one task. Nothing is read from or written to lm-eval's caches.

    Args:
        limit: at most so many documents, the first ones; for MMLU of each subject. None means all.
        few_shot: examples in each prompt; None is the task's default.
        batch_size: prompts at once, or "auto".
        seed: of the choice of few-shot examples, and of sampling where a task samples.

    Raises:
        UsageError: `limit` or `few_shot` do not fit.
        ResourceError: memory does not hold even one prompt.
        FactorctlError: the model's outputs are not finite.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit} leaves no document", "give 1 or more, or leave it out")
    shots = plan.few_shot(few_shot)
    with quiet_libraries():
        lm = HarnessModel(model, tokenizer, batch_size=batch_size, title=f"scoring {plan.name}", progress=progress)
        set_seed(seed)
        for task in plan.tasks.values():
            task.set_config(key="num_fewshot", value=shots)
            task.set_fewshot_seed(seed=seed)
        results = evaluate(
            lm=lm, task_dict={"tasks": dict(plan.tasks)}, limit=limit, bootstrap_iters=0, log_samples=True
        )
    return TaskScores(
        name=plan.name,
        metric=plan.metric_name,
        few_shot=shots,
        limit=limit,
        seed=seed,
        batch_size=lm.smallest_batch or 0,
        data=plan.data,
        fingerprint=plan.fingerprint,
        versions=plan.versions,
        documents=list(_answers(plan, results["samples"])),
    )


def _answers(plan: TaskPlan, samples: Mapping[str, list[dict[str, Any]]]) -> Iterator[DocumentAnswer]:
    for name, task in plan.tasks.items():
        for sample in samples[name]:
            if sample["filter"] == plan.filter:
                yield _answer(plan.metric, name, task, sample)


def _answer(metric: str, name: str, task: Any, sample: dict[str, Any]) -> DocumentAnswer:
    choices = len(task.doc_to_choice(sample["doc"])) if task.OUTPUT_TYPE == "multiple_choice" else 0
    likelihoods = [float(likelihood) for likelihood, _ in sample["filtered_resps"][:choices]]
    if not all(math.isfinite(value) for value in likelihoods):
        raise FactorctlError(
            f"document {sample['doc_id']} of {name}: the model's log-likelihoods are {likelihoods}",
            "its outputs overflow or are damaged; try --dtype float32, and `factorctl verify` on the checkpoint",
        )
    return DocumentAnswer(
        task=name,
        doc_id=sample["doc_id"],
        doc_hash=sample["doc_hash"],
        prompt_hash=sample["prompt_hash"],
        target=_right_choice(task, sample["doc"]) if choices else str(sample["target"]),
        loglikelihoods=likelihoods,
        outputs=[] if choices else [str(output) for output in sample["filtered_resps"]],
        acc=_number(sample.get("acc")),
        acc_norm=_number(sample.get("acc_norm")),
        score=float(sample[metric]),
    )


def _right_choice(task: Any, doc: dict[str, Any]) -> int | list[int]:
    """Index of the right choice, found as lm-eval finds it: in WinoGrande the context, not the answer, has choices."""
    right = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if isinstance(right, str):
        right = task.doc_to_choice(doc).index(right)
    return [int(index) for index in right] if isinstance(right, list) else int(right)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
