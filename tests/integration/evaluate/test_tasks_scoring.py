"""Resolving task names and scoring a tiny model: progress, memory, limits, the Hub, and every refusal."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.task
import lm_eval.tasks
import pytest
import torch
from support.tasks import make_reader, make_task_data
from transformers import AutoTokenizer, GPT2Config, PreTrainedModel

from factorctl.errors import FactorctlError, ResourceError, UsageError
from factorctl.evaluation.tasks import PAPER_TASKS, TaskPlan, TaskScores, definitions, resolve_tasks, score_tasks
from factorctl.evaluation.tasks.harness_model import HarnessModel, fitting_batch_size, row_bytes
from factorctl.evaluation.tasks.plans import primary_metric
from factorctl.models.loading import load_dense
from factorctl.progress import SilentProgress


class Recorder(SilentProgress):
    """Counts what each stage was told."""

    def __init__(self) -> None:
        super().__init__()
        self.stages: dict[str, list[int]] = {}

    @contextmanager
    def stage(self, title: str, total: int | None = None, unit: str = "") -> Iterator[Any]:
        counts = self.stages[title] = [total or 0, 0]

        class Counter:
            def advance(self, amount: int = 1, **fields: object) -> None:
                counts[1] += amount

        yield Counter()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_task_data(tmp_path_factory.mktemp("task-data"), rows=9)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_reader(tmp_path_factory.mktemp("reader") / "tiny")


@pytest.fixture(scope="module")
def model(reader: Path) -> PreTrainedModel:
    return load_dense(reader)


@pytest.fixture(scope="module")
def tokenizer(reader: Path) -> Any:
    return AutoTokenizer.from_pretrained(reader)


@pytest.fixture
def small_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that lm-eval knows the paper's tasks only: reading all of its definitions takes 12 s and more."""
    monkeypatch.setattr(definitions, "full_index", definitions.paper_index)


def plan_of(data: Path, task: str) -> TaskPlan:
    (plan,) = resolve_tasks([task], task_data=data)
    return plan


def score(model: Any, tokenizer: Any, plan: TaskPlan, **changes: Any) -> TaskScores:
    usual = {"limit": None, "few_shot": None, "batch_size": "auto", "seed": 0, "progress": SilentProgress()}
    return score_tasks(model, tokenizer, plan, **(usual | changes))


def test_paper_stands_for_the_eight_each_once(data: Path) -> None:
    plans = resolve_tasks(["piqa", "paper", "boolq"], task_data=data)
    assert [plan.name for plan in plans] == ["piqa", *(name for name in PAPER_TASKS if name != "piqa")]
    assert {plan.documents for plan in plans} == {9}
    assert plans[0].data == "piqa.jsonl and piqa_train.jsonl"
    assert "lacks 55 of MMLU's 57 subjects" in plans[-1].notes[0]


def test_the_fingerprint_follows_the_documents(data: Path, tmp_path: Path) -> None:
    other = make_task_data(tmp_path, rows=9, tasks=("piqa",), seed=1)
    assert plan_of(data, "piqa").fingerprint == plan_of(data, "piqa").fingerprint != plan_of(other, "piqa").fingerprint


def test_scores_state_chance_majority_versions_and_counts(model: Any, tokenizer: Any, data: Path) -> None:
    arc = score(model, tokenizer, plan_of(data, "arc_easy"))
    assert arc.chance == pytest.approx((1 / 3 + 1 / 4 + 1 / 5) / 3)  # 3, 4, 5 choices in turn
    boolq = score(model, tokenizer, plan_of(data, "boolq"))
    assert (boolq.chance, boolq.majority) == (0.5, pytest.approx(6 / 9))
    assert boolq.versions == {"lm_eval": lm_eval.__version__, "task": "2.0"}
    assert (boolq.n, boolq.few_shot, boolq.metric, boolq.data) == (9, 0, "acc", "boolq.jsonl and boolq_train.jsonl")


def test_limit_takes_the_first_documents_of_each_subject(model: Any, tokenizer: Any, data: Path) -> None:
    whole, part = (score(model, tokenizer, plan_of(data, "mmlu"), limit=limit, batch_size=1) for limit in (None, 2))
    assert [(answer.task, answer.doc_id) for answer in part.documents] == [
        ("mmlu_anatomy", 0), ("mmlu_anatomy", 1), ("mmlu_virology", 0), ("mmlu_virology", 1),
    ]  # fmt: skip
    kept = [answer for answer in whole.documents if answer.doc_id < 2]
    assert [answer.doc_hash for answer in part.documents] == [answer.doc_hash for answer in kept]


def test_every_answer_is_counted_and_nothing_else_is_said(
    model: Any, tokenizer: Any, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    progress = Recorder()
    for task, choices in [("piqa", 2), ("hellaswag", 4), ("mmlu", 4)]:
        score(model, tokenizer, plan_of(data, task), progress=progress)
        assert progress.stages[f"scoring {task}"] == [9 * choices, 9 * choices]
    assert progress.notes == []
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()


def test_the_callers_tokenizer_stays_as_it_was(model: Any, tokenizer: Any, data: Path) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    score(model, bare, plan_of(data, "piqa"), limit=2)
    assert bare.pad_token is None


def out_of_memory_above(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = HarnessModel._model_call

    def call(self: Any, ids: torch.Tensor, **others: Any) -> torch.Tensor:
        if len(ids) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return whole(self, ids, **others)  # type: ignore[no-any-return]

    monkeypatch.setattr(HarnessModel, "_model_call", call)


def test_batches_are_halved_until_they_fit(
    model: Any, tokenizer: Any, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = score(model, tokenizer, plan_of(data, "piqa"), batch_size=2)
    out_of_memory_above(2, monkeypatch)
    progress = Recorder()
    found = score(model, tokenizer, plan_of(data, "piqa"), batch_size=8, progress=progress)
    assert found == expected
    assert found.batch_size == 2
    assert progress.stages["scoring piqa"] == [18, 18]
    assert progress.notes == [
        "scoring piqa: memory does not hold 8 prompts at once; taking 4",
        "scoring piqa: memory does not hold 4 prompts at once; taking 2",
    ]


def test_a_batch_size_that_did_not_fit_is_not_carried_over(
    model: Any, tokenizer: Any, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        out_of_memory_above(1, patch)
        assert score(model, tokenizer, plan_of(data, "piqa"), batch_size=4).batch_size == 1
    assert score(model, tokenizer, plan_of(data, "piqa"), batch_size=4).batch_size == 4


def test_a_prompt_that_does_not_fit_alone(
    model: Any, tokenizer: Any, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out_of_memory_above(0, monkeypatch)
    with pytest.raises(ResourceError, match=r"scoring piqa: memory does not hold one prompt of \d+ tokens"):
        score(model, tokenizer, plan_of(data, "piqa"), batch_size=2)


def test_other_errors_of_the_model_are_not_taken_for_memory(
    model: Any, tokenizer: Any, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, ids: torch.Tensor, **others: Any) -> torch.Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(HarnessModel, "_model_call", broken)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        score(model, tokenizer, plan_of(data, "piqa"))


def test_the_batch_size_follows_free_memory(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    row = row_bytes(model.config, 100, 4)
    assert row > 100 * 4 * 3 * model.config.vocab_size
    for free, rows in [(0, 1), (5 * row, 2), (21 * row, 10), (10**15, 20)]:
        monkeypatch.setattr("factorctl.memory.available_memory", lambda free=free: free)
        assert fitting_batch_size(model, 100) == rows  # 20: 2048 tokens on a CPU
    assert fitting_batch_size(model, 4) == 64
    assert row_bytes(GPT2Config(), 100, 2) > 100 * 2 * 3 * GPT2Config().vocab_size  # names its sizes differently


def test_outputs_that_are_no_numbers_are_refused(reader: Path, tokenizer: Any, data: Path) -> None:
    broken = load_dense(reader)
    with torch.no_grad():
        broken.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(FactorctlError, match=r"document 0 of piqa: the model's log-likelihoods are \[nan, nan\]"):
        score(broken, tokenizer, plan_of(data, "piqa"))


def test_prompts_that_are_cut_are_counted(data: Path, tmp_path: Path) -> None:
    short = load_dense(make_reader(tmp_path / "short", max_position_embeddings=48))
    progress = SilentProgress()
    score(short, AutoTokenizer.from_pretrained(tmp_path / "short"), plan_of(data, "boolq"), progress=progress)
    (note,) = progress.notes
    assert note.startswith("scoring boolq: ")
    assert note.endswith("prompts are longer than the model's 48 tokens and lose their beginning")


def test_an_answer_longer_than_the_model(data: Path, tmp_path: Path) -> None:
    short = load_dense(make_reader(tmp_path / "short", max_position_embeddings=4))
    with pytest.raises(UsageError, match=r"scoring piqa: an answer of \d+ tokens does not fit the model's 4"):
        score(short, AutoTokenizer.from_pretrained(tmp_path / "short"), plan_of(data, "piqa"))


def test_limits_and_few_shot_counts_that_do_not_fit(model: Any, tokenizer: Any, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--limit 0 leaves no document"):
        score(model, tokenizer, plan_of(data, "piqa"), limit=0)
    with pytest.raises(UsageError, match="--few-shot -1 is negative"):
        score(model, tokenizer, plan_of(data, "piqa"), few_shot=-1)
    with pytest.raises(UsageError, match="piqa has 5 few-shot examples at hand; --few-shot asks for 6"):
        resolve_tasks(["piqa"], task_data=data, few_shot=6)  # of 6 rows, lm-eval keeps one back
    (tmp_path / "piqa.jsonl").write_bytes((data / "piqa.jsonl").read_bytes())
    with pytest.raises(UsageError) as caught:
        resolve_tasks(["piqa"], task_data=tmp_path, few_shot=1)
    assert caught.value.message == "piqa has 0 few-shot examples at hand; --few-shot asks for 1"
    assert caught.value.hint == "add examples as piqa_train.jsonl to --task-data, or ask for fewer"


def test_subjects_without_examples_are_scored_without_them(data: Path, tmp_path: Path) -> None:
    (tmp_path / "mmlu.jsonl").write_bytes((data / "mmlu.jsonl").read_bytes())
    examples = (data / "mmlu_dev.jsonl").read_text().splitlines()
    (tmp_path / "mmlu_dev.jsonl").write_text("\n".join(row for row in examples if "anatomy" in row))
    assert plan_of(tmp_path, "mmlu").few_shot(None) == 0
    with pytest.raises(UsageError, match="mmlu has 0 few-shot examples at hand; --few-shot asks for 1"):
        resolve_tasks(["mmlu"], task_data=tmp_path, few_shot=1)


def test_a_task_that_is_zero_shot_by_definition_stays_so(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config_of = lm_eval.api.task.ConfigurableTask.get_config
    monkeypatch.setattr(
        lm_eval.api.task.ConfigurableTask,
        "get_config",
        lambda self, name: 0 if name == "num_fewshot" else config_of(self, name),
    )
    (plan,) = resolve_tasks(["piqa"], task_data=data, few_shot=5)
    assert plan.few_shot(5) == 0
    assert plan.notes == ("piqa is zero-shot by definition; --few-shot 5 does not apply to it",)


def test_few_shot_follows_each_call_and_not_the_one_before(model: Any, tokenizer: Any, data: Path) -> None:
    plan = plan_of(data, "piqa")
    plain = score(model, tokenizer, plan)
    assert score(model, tokenizer, plan, few_shot=3).few_shot == 3
    assert score(model, tokenizer, plan) == plain


@pytest.mark.usefixtures("small_index")
def test_unknown_tasks_get_a_suggestion() -> None:
    with pytest.raises(UsageError) as caught:
        resolve_tasks(["hellaswga"], task_data=None)
    assert caught.value.message == "unknown task 'hellaswga'"
    assert str(caught.value.hint).startswith("did you mean 'hellaswag'? 'paper' stands for hellaswag, openbookqa,")
    with pytest.raises(UsageError) as caught:
        resolve_tasks(["mmlu_anatomyy"], task_data=None)
    assert "did you mean 'mmlu_anatomy'" in str(caught.value.hint)
    with pytest.raises(UsageError, match="no task is named"):
        resolve_tasks([], task_data=None)


def rows_of(data: Path, name: str) -> datasets.Dataset:
    return datasets.Dataset.from_list([json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()])


def fake_hub(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's data sets as `data` has them; every subject of MMLU gets all rows."""
    files = {"baber/piqa": "piqa", "ARC-Easy": "arc_easy", "ARC-Challenge": "arc_challenge", "cais/mmlu": "mmlu"}

    def load_dataset(path: str, name: str | None = None, **others: Any) -> dict[str, datasets.Dataset]:
        stem = files.get(name or "") or files[path]
        rows = rows_of(data, stem)
        return dict.fromkeys(("train", "validation", "test", "dev"), rows)

    monkeypatch.setattr(lm_eval.api.task.datasets, "load_dataset", load_dataset)


def test_the_hubs_data_scores_as_the_same_rows_in_a_file(
    model: Any, tokenizer: Any, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_hub(data, monkeypatch)
    (plan,) = resolve_tasks(["piqa"], task_data=None)
    assert plan.data == "Hub data set baber/piqa"
    found = score(model, tokenizer, plan)
    assert found.documents == score(model, tokenizer, plan_of(data, "piqa")).documents


@pytest.mark.usefixtures("small_index")
def test_tags_are_their_tasks_and_mmlu_is_one(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(data, monkeypatch)
    plans = resolve_tasks(["ai2_arc", "mmlu"], task_data=None)
    assert [(plan.name, len(plan.tasks)) for plan in plans] == [("arc_challenge", 1), ("arc_easy", 1), ("mmlu", 57)]


def index_of(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that lm-eval knows only the tasks of one of its folders."""
    root = Path(lm_eval.tasks.__file__).parent
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=[root / folder])
    monkeypatch.setattr(definitions, "full_index", lambda: manager)


def test_a_task_that_generates_text(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    index_of("gsm8k", monkeypatch)
    rows = datasets.Dataset.from_list([{"question": f"{n} + 1", "answer": f"so #### {n + 1}"} for n in range(6)])
    monkeypatch.setattr(
        lm_eval.api.task.datasets, "load_dataset", lambda *names, **others: {"train": rows, "test": rows}
    )
    (plan,) = resolve_tasks(["gsm8k"], task_data=None)
    assert (plan.default_few_shot, plan.metric_name) == (5, "exact_match,strict-match")
    with pytest.raises(UsageError, match="gsm8k has 6 few-shot examples at hand; --few-shot asks for 7"):
        plan.few_shot(7)
    monkeypatch.setattr(HarnessModel, "max_gen_toks", 8)
    progress = Recorder()
    found = score(model, tokenizer, plan, limit=3, progress=progress)
    assert progress.stages["scoring gsm8k"] == [3, 3]
    assert (found.n, found.few_shot, found.chance, found.metric) == (3, 5, None, "exact_match,strict-match")
    assert [(answer.target, len(answer.outputs), answer.loglikelihoods) for answer in found.documents] == [
        (f"so #### {n + 1}", 1, []) for n in range(3)
    ]


def test_tasks_that_run_the_models_code_are_refused_before_anything_is_fetched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    index_of("humaneval", monkeypatch)
    with pytest.raises(UsageError) as caught:
        resolve_tasks(["humaneval"], task_data=None)
    assert str(caught.value) == (
        "task 'humaneval' runs code that the model writes\nHint: run it with lm-eval itself, in a sandbox"
    )


@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        (
            ConnectionError("Couldn't reach 'baber/piqa' on the Hub"),
            ResourceError,
            "cannot be fetched from the Hub: Co",
        ),
        (datasets.exceptions.DatasetNotFoundError("no such"), ResourceError, "cannot be fetched from the Hub: no such"),
        (ModuleNotFoundError("No module named 'sacrebleu'", name="sacrebleu"), UsageError, "needs a package"),
        (KeyError("validation"), UsageError, "task 'piqa' cannot be loaded by lm-eval: 'validation'"),
    ],
    ids=["offline", "gone", "package", "other"],
)
def test_data_that_cannot_be_had(
    failure: Exception, kind: type[FactorctlError], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(*arguments: Any, **others: Any) -> None:
        raise failure

    monkeypatch.setattr(lm_eval.api.task.datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("factorctl.evaluation.tasks.hub_tasks.HF_HUB_OFFLINE", False)
    with pytest.raises(kind) as caught:
        resolve_tasks(["piqa"], task_data=None)
    assert message in caught.value.message
    hint = "install sacrebleu" if isinstance(failure, ImportError) else "give --task-data DIR with DIR/piqa.jsonl"
    assert str(caught.value.hint).startswith(hint)


def test_a_task_without_a_score_per_document_is_refused() -> None:
    class Perplexity:
        def aggregation(self) -> dict[str, Any]:
            return {"word_perplexity": sum}

        def higher_is_better(self) -> dict[str, bool]:
            return {"word_perplexity": False}

    with pytest.raises(UsageError) as caught:
        primary_metric("wikitext", Perplexity())
    assert caught.value.message.startswith("task 'wikitext' reports word_perplexity: none is a score per document")
