"""Our scores against those of lm-eval's own command line on the same files, to the last document."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.tasks import (
    SUBJECTS,
    CommandLineRun,
    lm_eval_command_line,
    make_reader,
    make_task_data,
    write_definition,
    write_group,
)
from support.tiny import factorize_quietly, weights_only
from transformers import AutoTokenizer

import factorctl
from factorctl.evaluation.tasks import PAPER_TASKS, TaskScores, resolve_tasks, score_tasks
from factorctl.models.loading import load_dense
from factorctl.progress import SilentProgress

LM_EVAL_SEED = 1234
"""Of the few-shot examples, when `lm_eval` is not told otherwise."""
REAL_DATA = Path(os.environ.get("FACTORCTL_TEST_DATA", Path(__file__).parents[3] / "../shared/data"))


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_reader(tmp_path_factory.mktemp("reader") / "tiny")


def ours(
    model: Path, data: Path, tasks: list[str], *, limit: int | None = None, few_shot: int | None = None
) -> dict[str, TaskScores]:
    dense, tokenizer = load_dense(model), AutoTokenizer.from_pretrained(model)
    return {
        plan.name: score_tasks(
            dense,
            tokenizer,
            plan,
            limit=limit,
            few_shot=few_shot,
            batch_size=4,
            seed=LM_EVAL_SEED,
            progress=SilentProgress(),
        )
        for plan in resolve_tasks(tasks, task_data=data)
    }


def assert_same(found: TaskScores, run: CommandLineRun, names: list[str]) -> None:
    theirs = [sample for name in names for sample in run.samples[name]]
    assert len(found.documents) == len(theirs) > 0
    for answer, sample in zip(found.documents, theirs, strict=True):
        likelihoods = [float(pair[0]) for pair in sample["filtered_resps"]]
        assert answer.loglikelihoods == pytest.approx(likelihoods, rel=1e-6)
        assert (answer.acc, answer.acc_norm) == (sample["acc"], sample.get("acc_norm"))
        assert answer.prompt_hash == sample["prompt_hash"]
        assert answer.doc_id == sample["doc_id"]


def test_all_eight_tasks_score_as_lm_evals_command_line_does(
    reader: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_task_data(tmp_path / "data", rows=7)
    found = ours(reader, data, ["paper"])
    own = {task: [write_definition(tmp_path / "yaml", task, data)] for task in PAPER_TASKS if task != "mmlu"}
    own["mmlu"] = [write_definition(tmp_path / "yaml", "mmlu", data, subject) for subject in SUBJECTS]
    group = write_group(tmp_path / "yaml", "own_mmlu", own["mmlu"])
    asked = ",".join([name for task, names in own.items() if task != "mmlu" for name in names] + [group])
    run = lm_eval_command_line(
        monkeypatch, tmp_path / "yaml", tmp_path / "out",
        "--model_args", f"pretrained={reader},dtype=float32", "--tasks", asked, "--batch_size", 4,
    )  # fmt: skip
    assert list(found) == list(PAPER_TASKS)
    for task, names in own.items():
        assert_same(found[task], run, names)
        total = group if task == "mmlu" else names[0]
        assert found[task].value == pytest.approx(run.results[total][f"{found[task].metric},none"], abs=1e-12)
    normed = {"hellaswag", "openbookqa", "arc_easy", "arc_challenge", "piqa"}
    assert {task for task, scores in found.items() if scores.metric == "acc_norm"} == normed
    assert all(scores.few_shot == 0 for scores in found.values())


def test_few_shot_prompts_are_those_of_lm_evals_command_line(
    reader: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = ["winogrande", "arc_easy", "piqa", "mmlu"]
    data = make_task_data(tmp_path / "data", rows=6)
    found = ours(reader, data, tasks, limit=2, few_shot=2)
    own = {task: [write_definition(tmp_path / "yaml", task, data)] for task in tasks if task != "mmlu"}
    own["mmlu"] = [write_definition(tmp_path / "yaml", "mmlu", data, subject) for subject in SUBJECTS]
    run = lm_eval_command_line(
        monkeypatch, tmp_path / "yaml", tmp_path / "out",
        "--model_args", f"pretrained={reader},dtype=float32", "--num_fewshot", 2, "--limit", 2, "--batch_size", 4,
        "--tasks", ",".join(name for names in own.values() for name in names),
    )  # fmt: skip
    for task, names in own.items():
        assert_same(found[task], run, names)
        assert found[task].few_shot == 2


def test_a_checkpoint_with_all_experts_on_answers_as_its_source(reader: Path, tmp_path: Path) -> None:
    data = make_task_data(tmp_path / "data", rows=6)
    factorize_quietly(weights_only(reader, tmp_path / "factored"))
    factored = factorctl.load(tmp_path / "factored", top_k=4)
    dense = ours(reader, data, ["paper"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "factored")
    for plan in resolve_tasks(["paper"], task_data=data):
        found = score_tasks(
            factored, tokenizer, plan, limit=None, few_shot=None, batch_size=4, seed=0, progress=SilentProgress()
        )
        for answer, expected in zip(found.documents, dense[plan.name].documents, strict=True):
            assert (answer.acc, answer.acc_norm) == (expected.acc, expected.acc_norm)
            assert answer.loglikelihoods == pytest.approx(expected.loglikelihoods, rel=1e-5)


def test_real_files_and_a_trained_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, bench = REAL_DATA / "models/stories260K", REAL_DATA / "bench"
    if not (model.is_dir() and bench.is_dir()):
        pytest.skip("no real data: set FACTORCTL_TEST_DATA to a directory with models/stories260K and bench")
    tasks = ["openbookqa", "winogrande", "arc_easy", "piqa"]  # BoolQ's passages are longer than the model's context
    found = ours(model, bench, tasks, limit=6)
    names = [write_definition(tmp_path / "yaml", task, bench) for task in tasks]
    run = lm_eval_command_line(
        monkeypatch, tmp_path / "yaml", tmp_path / "out",
        "--model_args", f"pretrained={model},dtype=float32", "--limit", 6, "--batch_size", 4,
        "--tasks", ",".join(names),
    )  # fmt: skip
    for task, name in zip(tasks, names, strict=True):
        assert_same(found[task], run, [name])
