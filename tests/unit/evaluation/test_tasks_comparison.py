"""Paired comparison, chance, what is kept, and the samples file, on answers written by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from factorctl.errors import IntegrityError, UsageError
from factorctl.evaluation.tasks import (
    DocumentAnswer,
    TaskScores,
    average_kept,
    compare_scores,
    read_samples,
    write_samples,
)


def answer(number: int, score: float, *, choices: int = 2, target: int | list[int] | str = 0) -> DocumentAnswer:
    return DocumentAnswer(
        task="piqa",
        doc_id=number,
        doc_hash=f"doc{number}",
        prompt_hash=f"prompt{number}",
        target=target,
        loglikelihoods=[-1.5 - number / 3] * choices,
        outputs=[] if choices else ["text"],
        acc=score,
        acc_norm=None,
        score=score,
    )


def scores(values: list[float], *, choices: int = 2, **changes: Any) -> TaskScores:
    documents = [answer(number, value, choices=choices) for number, value in enumerate(values)]
    plain = TaskScores(
        name="piqa",
        metric="acc",
        few_shot=0,
        limit=None,
        seed=0,
        batch_size=4,
        data="piqa.jsonl",
        fingerprint="f" * 64,
        versions={"lm_eval": "0.4.13", "task": "1.0"},
        documents=documents,
    )
    return dataclasses.replace(plain, **changes)


def test_paired_difference_and_exact_mcnemar_by_hand() -> None:
    """10 documents: 5 both right, 1 only the model, 4 only dense. p = 2 P(X <= 1), X ~ Binomial(5, 1/2) = 12/32."""
    dense = scores([1] * 5 + [0] + [1] * 4)
    model = scores([1] * 5 + [1] + [0] * 4)
    found = compare_scores(model, dense)
    assert (found.wins, found.losses, found.n) == (1, 4, 10)
    assert found.p_value == pytest.approx(12 / 32)
    assert (found.model, found.dense) == (pytest.approx(0.6), pytest.approx(0.9))
    assert found.difference == pytest.approx(-0.3)
    differences = [0] * 5 + [1] + [-1] * 4
    variance = sum((d + 0.3) ** 2 for d in differences) / 9
    assert found.stderr_diff == pytest.approx(math.sqrt(variance / 10))
    assert found.kept == pytest.approx(0.6 / 0.9)
    assert found.kept_above_chance == pytest.approx(0.1 / 0.4)
    assert found.to_json()["kept_above_chance"] == found.kept_above_chance


def test_equal_answers_differ_in_nothing() -> None:
    found = compare_scores(scores([1, 0, 1]), scores([1, 0, 1]))
    assert (found.p_value, found.stderr_diff, found.difference) == (1.0, 0.0, 0.0)


def test_no_share_above_chance_where_dense_is_not_clearly_above_it() -> None:
    found = compare_scores(scores([1] * 60 + [0] * 40), scores([1] * 55 + [0] * 45))
    assert found.kept == pytest.approx(60 / 55)
    assert found.kept_above_chance is None
    assert found.why_not_kept == (
        "the dense model is +0.050 from chance with a standard error of 0.050: not clearly above it"
    )


def test_nothing_is_kept_of_nothing() -> None:
    found = compare_scores(scores([1, 0]), scores([0, 0]))
    assert found.kept is None
    assert found.kept_above_chance is None


def test_generated_text_has_no_chance() -> None:
    found = compare_scores(scores([1, 0], choices=0), scores([1, 1], choices=0))
    assert found.chance is None
    assert found.majority is None
    assert found.why_not_kept == "chance is unknown where text is generated"


def test_chance_is_the_mean_over_documents_and_majority_the_commonest_answer() -> None:
    documents = [
        answer(0, 1, choices=3, target=0),
        answer(1, 0, choices=5, target=2),
        answer(2, 0, choices=4, target=2),
        answer(3, 0, choices=4, target=[1, 2]),
    ]
    found = scores([], documents=documents)
    assert found.chance == pytest.approx((1 / 3 + 1 / 5 + 1 / 4 + 2 / 4) / 4)
    assert found.majority == pytest.approx(3 / 4)


def test_averages_are_ratios_of_means_so_that_a_task_at_chance_cannot_blow_them_up() -> None:
    strong = compare_scores(scores([1] * 70 + [0] * 30), scores([1] * 90 + [0] * 10))
    chance = compare_scores(scores([1] * 52 + [0] * 48), scores([1] * 50 + [0] * 50))
    assert chance.kept_above_chance is None
    average = average_kept([strong, chance])
    assert (average.tasks, average.model, average.dense) == (2, pytest.approx(0.61), pytest.approx(0.70))
    assert average.kept == pytest.approx(0.61 / 0.70)
    assert average.kept_above_chance == pytest.approx((0.20 + 0.02) / (0.40 + 0.0))


def test_an_average_of_tasks_at_chance_says_why_it_has_no_number() -> None:
    average = average_kept([compare_scores(scores([1, 0]), scores([1, 0]))])
    assert average.kept == 1.0
    assert average.kept_above_chance is None
    assert "not clearly above" in str(average.why_not_kept)
    with pytest.raises(UsageError, match="no task was scored"):
        average_kept([])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"name": "boolq"}, "name is boolq in one, piqa in the other"),
        ({"metric": "acc_norm"}, "metric is acc_norm in one, acc in the other"),
        ({"few_shot": 5}, "few_shot is 5 in one, 0 in the other"),
        ({"documents": [answer(0, 1)]}, "one has 1 documents, the other 2"),
        ({"documents": [answer(0, 1), answer(7, 1)]}, "document 1 of piqa differs"),
        (
            {"documents": [answer(0, 1), dataclasses.replace(answer(1, 1), prompt_hash="other")]},
            "the prompts of document 1 differ",
        ),
    ],
)
def test_what_is_not_the_same_task_is_not_compared(changes: dict[str, Any], complaint: str) -> None:
    dense = scores([1, 0])
    with pytest.raises(UsageError) as caught:
        compare_scores(dataclasses.replace(dense, **changes), dense)
    assert caught.value.message == f"two runs of piqa cannot be compared: {complaint}"


def test_samples_come_back_as_they_were_written(tmp_path: Path) -> None:
    written = scores([1, 0, 1 / 3], limit=3)
    write_samples(tmp_path / "samples.jsonl", written)
    assert read_samples(tmp_path / "samples.jsonl") == written
    first, second, *_ = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert json.loads(first)["value"] == written.value
    assert json.loads(second)["doc_hash"] == "doc0"


def damaged(path: Path, line: int, change: Any) -> str:
    """The message about a samples file of which one line was changed."""
    write_samples(path, scores([1, 0]))
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    change(lines[line])
    path.write_text("".join(json.dumps(entry) + "\n" for entry in lines if entry))
    with pytest.raises(IntegrityError) as caught:
        read_samples(path)
    assert caught.value.hint == "delete it and run the evaluation again"
    return caught.value.message.removeprefix(str(path))


def test_a_samples_file_that_was_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    assert damaged(path, 2, dict.clear) == " holds 1 documents; its first line says 2"
    assert damaged(path, 2, lambda line: line.pop("score")) == ", line 3 has no field 'score'"
    assert damaged(path, 2, lambda line: line.update(doc_id="1")) == ", line 3: field 'doc_id' is '1'"
    assert damaged(path, 2, lambda line: line.update(mood="good")) == ", line 3 has an unknown field 'mood'"
    assert damaged(path, 2, lambda line: line.update(score=1)) == ": its documents do not add up to its first line"
    assert damaged(path, 0, lambda line: line.pop("seed")) == ", line 1 has no field 'seed'"
    assert damaged(path, 0, lambda line: line.pop("factorctl_samples")).startswith(" does not begin with the summary")
    write_samples(path, scores([1, 0]))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(IntegrityError, match="line 3 is not valid JSON"):
        read_samples(path)
