"""`factorctl eval` as a user meets it: what it prints and writes, comparing, and what it refuses with which words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import DenseSource
from support.command_line import cli
from support.evaluating import run
from support.tiny import factorize_quietly, make_tokenizer, weights_only
from transformers import AutoConfig, AutoModelForCausalLM

from factorctl.config.evaluate import EvalConfig
from factorctl.errors import ExitCode, IntegrityError, UsageError
from factorctl.evaluation.tasks import definitions
from factorctl.exporting.reports import report_tables
from factorctl.pipeline.evaluate.controls import CONTROLS

PROMISED = {
    "checkpoint", "source", "notation", "active_ffn_fraction", "perplexity", "tasks", "average", "controls", "fidelity",
    "manifest_sha256", "seed", "command", "hardware", "versions",
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("no_collection")


# the command


def test_the_command_prints_writes_and_reports(checkpoint: Path, text: Path, task_files: Path, tmp_path: Path) -> None:
    arguments = (
        "eval", checkpoint, "--data", text, "--tasks", "piqa,openbookqa", "--task-data", task_files, "--limit", 8,
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
    for words in ("oracle", "perplexity", "Above chance", "Layer fidelity"):
        assert words in shown.stdout
    assert "measurements were taken from an earlier run" in shown.stdout
    assert str(tmp_path / "out" / "results.json") in shown.stdout


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    checkpoint: Path, text: Path, task_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = cli(
        "eval", checkpoint, "--data", text, "--tasks", "piqa", "--task-data", task_files, "--limit", 5,
        "--controls-all", "--calibration", text, "--dry-run", "--format", "json",
    ).json  # fmt: skip
    assert plan["controls"] == list(CONTROLS)
    assert plan["measurements"] == 2 * (2 + len(CONTROLS)) + 1
    assert plan["tasks"] == {"piqa": 5}
    assert plan["out"] == "runs/tiny-1R4E2K-eval"
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


def test_an_unknown_task(checkpoint: Path, task_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(definitions, "full_index", definitions.paper_index)  # the full one takes half a minute
    refused("did you mean 'piqa'", checkpoint, "--tasks", "piqq", "--task-data", task_files, "--out", tmp_path / "out")


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
        (("--document-tokens", 0), "--document-tokens 0 is no positive number"),
        (("--few-shot", -1), "--few-shot -1 is out of range"),
        (("--batch-size", "big"), "--batch-size big is neither auto nor a number"),
        (("--data-tokens", "none"), "--data-tokens 'none' is not a number of tokens"),
        (("--report", "/"), "--report / is a directory"),
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
