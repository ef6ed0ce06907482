"""`eval` end to end: exactness at K = N, controls on a planted model, resuming, comparing, the command, bad input."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DenseSource
from helpers import LETTERS, calibrated, factorize_quietly, make_tokenizer, weights_only
from helpers_cli import cli
from test_finetune_planted import plant
from transformers import AutoConfig, AutoModelForCausalLM

import factorctl
from factorctl.config import EvalConfig
from factorctl.data.sampling import sample_documents
from factorctl.errors import ExitCode, IntegrityError, UsageError
from factorctl.evaluation.perplexity import TextDocument, score_text
from factorctl.exporting.reports import report_tables
from factorctl.models.loading import load_dense
from factorctl.pipeline import evaluate as pipeline
from factorctl.pipeline.control_models import fine_shape
from factorctl.pipeline.controls import CONTROLS
from factorctl.pipeline.evaluate import evaluate
from factorctl.pipeline.evaluate_result import EvalResult
from factorctl.progress import SilentProgress

SIZES: dict[str, Any] = {"window": 32, "stride": 16, "data_tokens": 1500, "calibration_tokens": 1024, "device": "cpu"}

PROMISED = {
    "checkpoint", "source", "notation", "active_ffn_fraction", "perplexity", "tasks", "average", "controls", "fidelity",
    "manifest_sha256", "seed", "command", "hardware", "versions",
}  # fmt: skip


def write_text(path: Path, *, seed: int = 0, documents: int = 30) -> Path:
    draw = random.Random(seed)
    rows = [{"text": "".join(draw.choices(LETTERS + " ", k=draw.randint(20, 90)))} for _ in range(documents)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_tasks(directory: Path, *, documents: int = 12) -> Path:
    """PIQA and OpenBookQA in the field names of the Hub data sets."""
    draw = random.Random(0)

    def word() -> str:
        return "".join(draw.choices(LETTERS, k=5))

    def rows(make: Any) -> str:
        return "".join(json.dumps(make(index)) + "\n" for index in range(documents))

    directory.mkdir()
    (directory / "piqa.jsonl").write_text(
        rows(lambda index: {"goal": word(), "sol1": word(), "sol2": word(), "label": index % 2})
    )
    (directory / "openbookqa.jsonl").write_text(
        rows(
            lambda index: {
                "id": str(index),
                "question_stem": word(),
                "choices": {"text": [word() for _ in range(4)], "label": ["A", "B", "C", "D"]},
                "answerKey": "ABCD"[index % 4],
            }
        )
    )
    return directory


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "words.jsonl")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("bench") / "bench")


@pytest.fixture(scope="module")
def checkpoint(dense_source: DenseSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1R4E2K with a random router, dense values; not to be changed."""
    out = tmp_path_factory.mktemp("made") / "tiny"
    factorize_quietly(weights_only(dense_source(), out))
    return out


@pytest.fixture(scope="module")
def refitted(dense_source: DenseSource, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared neurons, an analytic router, and values that are no longer the dense ones."""
    out = tmp_path_factory.mktemp("made") / "refitted"
    factorize_quietly(calibrated(dense_source(), out, text, scale="sum"))
    return out


def run(checkpoint: Path | str, out: Path, **options: Any) -> EvalResult:
    return evaluate(EvalConfig(checkpoint=str(checkpoint), out=out, **(SIZES | options)), SilentProgress())


# what it measures


def test_at_k_equal_n_a_checkpoint_scores_exactly_as_its_source(
    dense_source: DenseSource, text: Path, bench: Path, tmp_path: Path
) -> None:
    factorize_quietly(weights_only(dense_source(), tmp_path / "all", top_k=4))
    result = run(
        tmp_path / "all", tmp_path / "out", data=(str(text),), tasks=("piqa", "openbookqa"), task_data=bench,
        controls="all",
    )  # fmt: skip
    found = result.perplexity["words"]
    assert found.model == pytest.approx(found.dense, rel=1e-5)
    assert abs(found.log_difference) < 1e-6
    for name in ("piqa", "openbookqa"):
        assert (result.tasks[name]["wins"], result.tasks[name]["losses"]) == (0, 0)
        assert result.tasks[name]["model"] == result.tasks[name]["dense"]
        assert result.tasks[name]["stderr_diff"] == 0
    assert result.average["kept"] == 1.0
    assert result.active_ffn_fraction == 1.0
    assert result.controls == {}
    assert any("every control would be the dense model" in remark for remark in result.remarks)
    assert max(layer.relative_error for layer in result.fidelity) < 1e-5


def test_the_perplexities_are_those_of_the_two_models(
    checkpoint: Path, dense_source: DenseSource, text: Path, tmp_path: Path
) -> None:
    result = run(checkpoint, tmp_path / "out", data=(str(text),))
    tokenizer = make_tokenizer()
    ids = [tokenizer(json.loads(line)["text"])["input_ids"] for line in text.read_text().splitlines()]
    documents, left = [], SIZES["data_tokens"]
    for index, found in enumerate(ids):
        if left >= 2:
            documents.append(TextDocument(str(index), found[:left]))
            left -= len(found[:left])
    for name, model in (("dense", load_dense(dense_source())), ("model", factorctl.load(checkpoint))):
        expected = score_text(model, documents, window=32, stride=16, progress=SilentProgress()).perplexity
        assert getattr(result.perplexity["words"], name) == pytest.approx(expected, rel=1e-6)
    assert result.perplexity["words"].tokens == sum(len(document.ids) - 1 for document in documents)
    assert result.tasks == {}
    assert result.average == {"kept": None, "kept_above_chance": None}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with planted experts, factored with an analytic router, and text that the dense model wrote.

    On its own text a model's perplexity is the least, so here every loss of fidelity costs perplexity.
    """
    root = tmp_path_factory.mktemp("planted")
    source = plant(root / "dense")
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.lm_head.weight.mul_(3.0)
        for block in model.model.layers:
            block.mlp.down_proj.weight.mul_(20.0)
    model.save_pretrained(source)
    drawn = sample_documents(load_dense(source), make_tokenizer(), tokens=4000, document_length=64, seed=1)
    rows = [json.dumps({"text": document.text}) for document in drawn if len(document.text) > 4]
    (root / "own.jsonl").write_text("\n".join(rows) + "\n")
    factorize_quietly(
        weights_only(
            source,
            root / "made",
            top_k=2,
            router="analytic",
            calibration=str(root / "own.jsonl"),
            calibration_tokens=1024,
        )
    )
    return root / "made", root / "own.jsonl"


def test_random_and_oracle_routing_bracket_the_router(planted: tuple[Path, Path], tmp_path: Path) -> None:
    made, own = planted
    result = run(made, tmp_path / "out", data=(str(own),), controls="fast", data_tokens=3000)
    losses = {name: row.perplexity["own"] for name, row in result.controls.items()}
    model, dense = result.perplexity["own"].model, result.perplexity["own"].dense
    assert losses["random_routing"] > 1.05 * model
    assert losses["oracle_routing"] <= model * 1.001
    assert losses["oracle_routing"] >= dense * 0.999
    assert losses["all_experts"] == pytest.approx(dense, rel=1e-5)
    assert losses["static"] > model, "half the experts for everyone serve half of the words"
    assert all(layer.agreement is not None and layer.agreement > 0.6 for layer in result.fidelity)


def test_every_control_is_measured_at_the_same_active_neurons(
    refitted: Path, text: Path, bench: Path, tmp_path: Path
) -> None:
    result = run(
        refitted, tmp_path / "out", data=(str(text),), tasks=("piqa",), task_data=bench, limit=6, controls="all"
    )
    assert result.controls.keys() == CONTROLS.keys()
    active = result.active_ffn_fraction
    for name, row in result.controls.items():
        assert row.perplexity["words"] > 1
        assert 0 <= row.tasks["piqa"] <= 1
        assert row.task_average == row.tasks["piqa"]
        if name == "all_experts":
            assert row.active_ffn_fraction == 1.0
        elif name != "ffn_skip":  # two layers, and both always run
            assert row.active_ffn_fraction == pytest.approx(active)
    assert result.tasks["piqa"]["n"] == 6


def test_static_pruning_is_what_factorize_makes_at_top_k_0(
    refitted: Path, dense_source: DenseSource, text: Path, tmp_path: Path
) -> None:
    result = run(refitted, tmp_path / "out", data=(str(text),), controls="fast")
    shape = factorctl.load(refitted).model.layers[0].mlp.shape
    for name, refit in (("static", False), ("static_refit", True)):
        made = tmp_path / name
        factorize_quietly(
            weights_only(
                dense_source(),
                made,
                num_experts=6,
                top_k=0,
                shared_fraction=shape.active_ffn_fraction,
                refit=refit,
                calibration=str(text),
                calibration_tokens=1024,
            )
        )
        alone = run(made, tmp_path / f"{name}-eval", data=(str(text),))
        assert alone.active_ffn_fraction == pytest.approx(result.active_ffn_fraction)
        assert result.controls[name].perplexity["words"] == pytest.approx(alone.perplexity["words"].model, rel=1e-4)


def test_controls_leave_no_model_behind(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    run(checkpoint, tmp_path / "out", data=(str(text),), controls="all", calibration=str(text))
    assert list(tmp_path.rglob("*.safetensors")) == []


@pytest.mark.parametrize(
    ("neurons", "active", "expected"),
    [
        (1536, 768, (48, 24, 32)),
        (1536, 960, (48, 30, 32)),
        (48, 30, (8, 5, 6)),
        (172, 86, (4, 2, 43)),
        (7, 3, (7, 3, 1)),
    ],
)
def test_experts_of_moefication_hold_the_active_neurons_exactly(
    neurons: int, active: int, expected: tuple[int, int, int]
) -> None:
    shape = fine_shape(neurons, active, 32)
    assert (shape.num_experts, shape.top_k, shape.expert_size) == expected
    assert shape.active_neurons == active


def test_any_directory_can_stand_in_either_place(dense_source: DenseSource, text: Path, tmp_path: Path) -> None:
    """A stock mixture of experts against a dense model: no manifest, so no notation, controls or fidelity."""
    config = AutoConfig.for_model(
        "mixtral", vocab_size=40, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=128,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "moe")
    make_tokenizer().save_pretrained(tmp_path / "moe")
    result = run(tmp_path / "moe", tmp_path / "out", data=(str(text),), against=str(dense_source("qwen2")))
    assert (result.notation, result.active_ffn_fraction, result.manifest_sha256) == (None, None, None)
    assert result.fidelity == []
    tokenizer, nats, tokens = make_tokenizer(), 0.0, 0
    with torch.no_grad():
        for line in text.read_text().splitlines():
            ids = tokenizer(json.loads(line)["text"], return_tensors="pt")["input_ids"][:, :32]
            nats, tokens = nats + float(model(ids, labels=ids).loss) * (ids.shape[1] - 1), tokens + ids.shape[1] - 1
    assert result.perplexity["words"].model == pytest.approx(torch.tensor(nats / tokens).exp().item(), rel=0.02)


# resuming


class Interrupting:
    """Scores texts, and is interrupted at the call of a given number."""

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return score_text(*arguments, **options)


def same_figures(a: EvalResult, b: EvalResult) -> bool:
    return all(getattr(a, name) == getattr(b, name) for name in ("perplexity", "tasks", "controls", "fidelity"))


def test_an_interrupted_run_goes_on_where_it_stopped(
    checkpoint: Path, text: Path, bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"data": (str(text),), "tasks": ("piqa",), "task_data": bench, "controls": "fast",
                               "calibration": str(text)}  # fmt: skip
    whole = run(checkpoint, tmp_path / "whole", **options)
    monkeypatch.setattr(pipeline, "score_text", Interrupting(at=4))
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, tmp_path / "out", **options)
    assert not (tmp_path / "out" / "results.json").exists()
    counting = Interrupting(at=-1)
    monkeypatch.setattr(pipeline, "score_text", counting)
    resumed = run(checkpoint, tmp_path / "out", resume=True, **options)
    assert counting.calls == 7 - 3
    assert resumed.parts == {"computed": 15 - 7, "reused": 7}
    assert same_figures(whole, resumed)
    again = run(checkpoint, tmp_path / "out", resume=True, **options)
    assert again.parts == {"computed": 0, "reused": 15}
    assert same_figures(whole, again)


def test_without_resume_everything_is_computed_again(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert run(checkpoint, tmp_path / "out", data=(str(text),)).parts == {"computed": 3, "reused": 0}


def test_what_changed_is_never_reused(checkpoint: Path, refitted: Path, text: Path, tmp_path: Path) -> None:
    own = Path(shutil.copy(text, tmp_path / "words.jsonl"))
    out, notes = tmp_path / "out", SilentProgress()

    def resumed(made: Path = checkpoint, **options: Any) -> dict[str, int]:
        config = EvalConfig(checkpoint=str(made), out=out, data=(str(own),), resume=True, **(SIZES | options))
        return evaluate(config, notes).parts

    assert resumed() == {"computed": 3, "reused": 0}
    assert resumed() == {"computed": 0, "reused": 3}
    assert resumed(stride=8) == {"computed": 3, "reused": 0}, "another option"
    assert any("changed since; computed again" in note for note in notes.notes)
    assert resumed(refitted, stride=8) == {"computed": 2, "reused": 1}, "other weights; the dense model's stay"
    write_text(own, seed=5)
    assert resumed(refitted, stride=8) == {"computed": 3, "reused": 0}, "another text"
    assert resumed(refitted, stride=8, dtype="bfloat16") == {"computed": 3, "reused": 0}, "another dtype"


def test_a_damaged_part_is_computed_again(checkpoint: Path, text: Path, bench: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"data": (str(text),), "tasks": ("piqa",), "task_data": bench}
    first = run(checkpoint, tmp_path / "out", **options)
    for pattern in ("dense-perplexity-*.json", "model-task-*.jsonl"):
        (damaged,) = (tmp_path / "out" / "parts").glob(pattern)
        damaged.write_bytes(damaged.read_bytes()[:-20])
    again = run(checkpoint, tmp_path / "out", resume=True, **options)
    assert again.parts == {"computed": 2, "reused": 3}
    assert same_figures(first, again)


# the command


def test_the_command_prints_writes_and_reports(checkpoint: Path, text: Path, bench: Path, tmp_path: Path) -> None:
    arguments = (
        "eval", checkpoint, "--data", text, "--tasks", "piqa,openbookqa", "--task-data", bench, "--limit", 8,
        "--controls", "--calibration", text, "--calibration-tokens", 1024, "--window", 32, "--data-tokens", 1500,
        "--out", tmp_path / "out", "--report", tmp_path / "eval.md", "--format", "json",
    )  # fmt: skip
    outcome = cli(*arguments)
    assert outcome.code == ExitCode.DONE, outcome.stderr
    result = outcome.json
    assert result.keys() >= PROMISED
    assert result["perplexity"]["words"].keys() >= {"model", "dense", "ci"}
    wanted = {"metric", "n", "model", "dense", "stderr_diff", "chance", "kept", "kept_above_chance", "p_value"}
    assert result["tasks"]["piqa"].keys() >= wanted
    assert result["average"].keys() == {"kept", "kept_above_chance"}
    assert list(result["controls"]) == [name for name, control in CONTROLS.items() if control.fast]
    assert (result["notation"], result["active_ffn_fraction"]) == ("1R4E2K", 0.5)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["tasks"] == result["tasks"]
    assert (tmp_path / "out" / "fidelity.png").read_bytes().startswith(b"\x89PNG")
    answers = {path.name for path in (tmp_path / "out").glob("samples_*.jsonl")}
    assert {"samples_piqa_model.jsonl", "samples_piqa_dense.jsonl", "samples_openbookqa_static.jsonl"} <= answers
    report = (tmp_path / "eval.md").read_text()
    for words in (
        *("## Evaluation", "| dense |", "| this model |", "| oracle routing |", "kept above chance", "McNemar"),
        *("torch ", "seed 0", "--calibration-tokens 1024", "first 8 documents", "### Layer fidelity"),
    ):
        assert words in report, words
    card = report_tables([tmp_path], result["manifest_sha256"])["Evaluation"]
    assert "| perplexity, words |" in card
    assert "| average kept |" in card
    shown = cli(*arguments[:-2], "--resume")
    for words in ("oracle", "perplexity", "above chance", "Layer fidelity"):
        assert words in shown.stdout
    assert "measurements were taken from an earlier run" in shown.stdout
    assert str(tmp_path / "out" / "results.json") in shown.stdout


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    checkpoint: Path, text: Path, bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = cli(
        "eval", checkpoint, "--data", text, "--tasks", "piqa", "--task-data", bench, "--limit", 5, "--controls-all",
        "--calibration", text, "--dry-run", "--format", "json",
    ).json  # fmt: skip
    assert plan["controls"] == list(CONTROLS)
    assert plan["measurements"] == 2 * 9 + 1
    assert plan["tasks"] == {"piqa": 5}
    assert plan["out"] == "runs/tiny-eval"
    assert plan["memory_bytes"] > 500_000_000
    assert plan["seconds"] >= 0
    assert list(tmp_path.iterdir()) == []


def test_two_reports_side_by_side(checkpoint: Path, refitted: Path, text: Path, tmp_path: Path) -> None:
    run(checkpoint, tmp_path / "a", data=(str(text),))
    run(refitted, tmp_path / "b", data=(str(text),), seed=3)
    outcome = cli("eval", "--compare", tmp_path / "a" / "results.json", tmp_path / "b", "--format", "json")
    assert outcome.code == ExitCode.DONE, outcome.stderr
    rows = {row["name"]: row["values"] for row in outcome.json["figures"]}
    assert rows["notation"] == ["1R4E2K", "1R4E2K+S12"]
    assert all(isinstance(value, float) for value in rows["perplexity, words"])
    assert "--seed differs: 0, 3" in outcome.json["remarks"]
    text_form = cli("eval", "--compare", tmp_path / "a", tmp_path / "b").stdout
    assert "1R4E2K+S12" in text_form
    (tmp_path / "other.json").write_text("{}")
    refused = cli("eval", "--compare", tmp_path / "a", tmp_path / "other.json")
    assert refused.code == ExitCode.USAGE
    assert "is no report of `factorctl eval`" in refused.message
    assert cli("eval", "--compare", tmp_path / "a", tmp_path / "none").code == ExitCode.USAGE


def test_the_newest_checkpoint_is_taken_and_named(
    dense_source: DenseSource, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    factorize_quietly(weights_only(dense_source(), Path("runs/newest")))
    outcome = cli("eval", "--data", text, "--window", 32, "--data-tokens", 400, "--no-fidelity")
    assert outcome.code == ExitCode.DONE, outcome.stderr
    assert "taking the newest, runs/newest" in outcome.message
    assert Path("runs/newest-eval/results.json").is_file()


# bad input


def refused(message: str, *arguments: object, code: ExitCode = ExitCode.USAGE) -> None:
    outcome = cli("eval", *arguments)
    assert message in outcome.message
    assert outcome.code == code


def test_nothing_to_evaluate_on(checkpoint: Path) -> None:
    refused("there is nothing to evaluate on", checkpoint)


def test_empty_text(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    refused("holds no text to evaluate", checkpoint, "--data", tmp_path / "empty.txt", "--out", tmp_path / "out")
    refused("is no text to evaluate on", checkpoint, "--data", "self", "--out", tmp_path / "out")


def test_another_vocabulary(checkpoint: Path, dense_source: DenseSource, text: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(dense_source("qwen2"), tmp_path / "other"))
    raw = json.loads((other / "tokenizer.json").read_text())
    vocabulary = raw["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(raw))
    refused(
        "have different vocabularies (32 and 32 tokens): token 'a' has id 4 in the one and 5 in the other",
        checkpoint, "--against", other, "--data", text, "--out", tmp_path / "out",
    )  # fmt: skip


def test_a_checkpoint_that_fails_verify(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(checkpoint, tmp_path / "damaged"))
    shard = sorted(damaged.glob("model-*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    refused("the file is damaged", damaged, "--data", text, "--out", tmp_path / "out", code=ExitCode.INTEGRITY)
    with pytest.raises(IntegrityError):
        run(damaged, tmp_path / "out", data=(str(text),))
    assert not (tmp_path / "out").exists()


def test_an_unknown_task(checkpoint: Path, bench: Path, tmp_path: Path) -> None:
    refused("did you mean 'piqa'", checkpoint, "--tasks", "piqq", "--task-data", bench, "--out", tmp_path / "out")


def test_a_source_that_is_gone_or_has_changed(dense_source: DenseSource, text: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(dense_source(), tmp_path / "source"))
    factorize_quietly(weights_only(source, tmp_path / "made"))
    shutil.rmtree(source)
    refused("; it was not found", tmp_path / "made", "--data", text, "--out", tmp_path / "out")
    shutil.copytree(dense_source(seed=9), source)
    refused("is not the dense model", tmp_path / "made", "--data", text, "--out", tmp_path / "out")
    result = run(tmp_path / "made", tmp_path / "out", data=(str(text),), against=str(source))
    assert any("--against is not the dense source" in remark for remark in result.remarks)
    refused("is another model", tmp_path / "made", "--data", text, "--against", source, "--controls")


def test_a_directory_that_does_not_say_its_source(dense_source: DenseSource, text: Path, tmp_path: Path) -> None:
    refused("does not say what it was made from", dense_source(), "--data", text, "--out", tmp_path / "out")
    refused(
        "is no native checkpoint: controls need", dense_source(), "--against", dense_source(), "--data", text,
        "--controls", "--out", tmp_path / "out",
    )  # fmt: skip


def test_an_unfinished_checkpoint_and_a_wrong_place_for_the_report(
    checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    unfinished = Path(shutil.copytree(checkpoint, tmp_path / "unfinished"))
    (unfinished / "factorctl.json").unlink()
    refused("it is not a complete factorctl checkpoint", unfinished, "--data", text, "--out", tmp_path / "out")
    refused("reports do not go into one", checkpoint, "--data", text, "--out", checkpoint)
    refused("no model 'nowhere'", "nowhere", "--data", text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--window", 4096), "--window 4096 is out of range"),
        (("--window", 32, "--stride", 32), "--stride 32 does not fit --window 32"),
        (("--limit", 0), "--limit 0 is no positive number"),
        (("--few-shot", -1), "--few-shot -1 is out of range"),
        (("--batch-size", "big"), "--batch-size big is neither auto nor a number"),
        (("--data-tokens", "none"), "--data-tokens 'none' is not a number of tokens"),
        (("--controls", "--calibration", "gone.txt"), "--calibration 'gone.txt' was not found"),
    ],
)
def test_options_out_of_range(
    options: tuple[object, ...], message: str, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    refused(message, checkpoint, "--data", text, "--out", tmp_path / "out", *options)


def test_stock_weights_that_are_missing_are_not_made_up(text: Path, tmp_path: Path, dense_source: DenseSource) -> None:
    config = AutoConfig.for_model(
        "mixtral", vocab_size=40, hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2, max_position_embeddings=128,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "moe")
    make_tokenizer().save_pretrained(tmp_path / "moe")
    raw = json.loads((tmp_path / "moe" / "config.json").read_text())
    (tmp_path / "moe" / "config.json").write_text(json.dumps(raw | {"num_hidden_layers": 2}))
    with pytest.raises(IntegrityError, match="missing keys"):
        run(tmp_path / "moe", tmp_path / "out", data=(str(text),), against=str(dense_source()))


def test_config_refuses_what_no_run_could_use() -> None:
    with pytest.raises(UsageError, match="--data-tokens 0"):
        EvalConfig(data_tokens=0)
    with pytest.raises(UsageError, match="--seed -1"):
        EvalConfig(seed=-1)
