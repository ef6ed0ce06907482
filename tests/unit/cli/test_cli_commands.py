"""The commands as a user meets them: what stdout and stderr hold, the keys of --format json, and what is written."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DenseSource
from support.command_line import cli
from support.tiny import calibrated, directory_bytes, factorize_quietly, leftovers, weights_only

import factorctl
from factorctl.checkpoint.aliases import ALIASES
from factorctl.checkpoint.manifest import read_manifest
from factorctl.contracts import DenseFFN
from factorctl.errors import ExitCode
from factorctl.ffn.slicing import unslice_ffn

PLAIN = ("--experts", 4, "--strategy", "contiguous", "--router", "random")

PROMISED = {
    "checkpoint", "source", "notation", "num_experts", "top_k", "shared_size", "expert_size", "strategy",
    "active_ffn_fraction", "identity_error", "num_layers", "seconds", "peak_rss_bytes",
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(dense_source: DenseSource, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished checkpoint with shared neurons and every closed-form step; not to be changed."""
    out = tmp_path_factory.mktemp("made") / "tiny"
    factorize_quietly(calibrated(dense_source("llama-biases"), out, text_file, strategy="clustered"))
    return out


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


# factorize


def test_factorize_prints_one_json_object_and_nothing_else(dense_source: DenseSource, tmp_path: Path) -> None:
    outcome = cli("factorize", dense_source(), *PLAIN, "--out", tmp_path / "out", "--format", "json")
    assert outcome.code == ExitCode.DONE
    result = outcome.json
    assert result.keys() >= PROMISED
    assert result["checkpoint"] == str(tmp_path / "out")
    assert (result["notation"], result["num_experts"], result["top_k"]) == ("1R4E2K", 4, 2)
    assert (result["expert_size"], result["shared_size"], result["num_layers"]) == (12, 0, 2)
    assert result["active_ffn_fraction"] == 0.5
    assert result["source"] == "llama"
    assert 0 <= result["identity_error"] <= 1e-5
    assert result["peak_rss_bytes"] > 50_000_000
    assert "Factorizing" in outcome.stderr


def test_the_summary_says_where_it_is_and_what_comes_next(dense_source: DenseSource, tmp_path: Path) -> None:
    outcome = cli("factorize", dense_source(), *PLAIN, "--out", tmp_path / "out")
    for words in ("1R4E2K", "50.0%", "identity error", "peak memory", str(tmp_path / "out"), "Next: factorctl "):
        assert words in outcome.stdout
    assert "Factorizing" not in outcome.stdout


def test_quiet_keeps_stderr_empty(dense_source: DenseSource, tmp_path: Path) -> None:
    outcome = cli("factorize", dense_source(), *PLAIN, "--out", tmp_path / "out", "--quiet")
    assert (outcome.code, outcome.stderr) == (ExitCode.DONE, "")
    assert "1R4E2K" in outcome.stdout


def test_a_dry_run_shows_the_plan_and_writes_nothing(
    dense_source: DenseSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FACTORCTL_CACHE", str(tmp_path / "cache"))
    source = dense_source()
    before = directory_bytes(source)
    outcome = cli("factorize", source, "--experts", 6, "--shared-fraction", 0.25, "--dry-run", "--format", "json")
    assert outcome.code == ExitCode.DONE
    plan = outcome.json
    assert plan["notation"] == "1R6E3K+S12"
    assert plan["calibrates"] is True
    assert plan["calibration_tokens"] == 16_384
    assert plan["out"] == "runs/llama-1R6E3K+S12"
    assert plan["disk_bytes"] > 20_000
    assert plan["memory_bytes"] > plan["disk_bytes"]
    longer = cli("factorize", source, "--calibration-tokens", "10M", "--dry-run", "--format", "json").json
    assert 0 <= plan["seconds"] < 600
    assert plan["seconds"] < longer["seconds"]
    assert plan["seconds_by_part"].keys() == {
        "reading and writing", "sampling text", "running the model", "fitting", "partitioning"
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == []
    assert directory_bytes(source) == before
    text = cli("factorize", source, *PLAIN, "--dry-run").stdout
    assert "nothing is written" in text
    assert "GB" in text
    assert "about" in text


@pytest.mark.parametrize(
    ("options", "notation"),
    [
        ((), "1R24E8K+S24"),  # of 48 neurons: 24 equal experts leave half of them or none
        (("--top-k", 2), "1R24E2K+S24"),
        (("--shared-fraction", 0.5), "1R24E8K+S24"),
        (("--experts", 8), "1R8E4K"),
        (("--experts", 8, "--shared-fraction", 0.25, "--top-k", 3), "1R8E3K+S8"),
    ],
)
def test_without_a_number_of_experts_the_recommended_split_is_meant(
    options: tuple[object, ...], notation: str, dense_source: DenseSource, tmp_path: Path
) -> None:
    outcome = cli("factorize", dense_source(), *options, "--workspace", tmp_path, "--dry-run", "--format", "json")
    assert outcome.json["notation"] == notation


@pytest.mark.parametrize(("dtype", "factor"), [("auto", 2), ("bfloat16", 2), ("float32", 4)])
def test_the_plan_counts_the_bytes_of_the_dtype(
    dtype: str, factor: int, dense_source: DenseSource, tmp_path: Path
) -> None:
    source = dense_source(dtype=torch.bfloat16)
    values = sum(path.stat().st_size for path in source.glob("*.safetensors")) / 2
    arguments = ("factorize", source, *PLAIN, "--dtype", dtype, "--dry-run", "--format", "json")
    assert cli(*arguments).json["disk_bytes"] == pytest.approx(values * factor, rel=0.1)


def test_unnamed_results_go_to_the_workspace_and_the_newest_is_found(
    dense_source: DenseSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = cli("factorize", dense_source(), *PLAIN, "--format", "json").json["checkpoint"]
    second = cli("factorize", dense_source(), *PLAIN, "--top-k", 1, "--format", "json").json["checkpoint"]
    assert (first, second) == ("runs/llama-1R4E2K", "runs/llama-1R4E1K")
    newest = cli("inspect", "--format", "json")
    assert newest.json["checkpoint"] == second
    assert cli("verify").stdout.startswith("runs/llama-1R4E1K is whole")


def test_no_checkpoint_named_and_none_made(tmp_path: Path) -> None:
    for command in ("inspect", "verify"):
        outcome = cli(command, "--workspace", tmp_path)
        assert outcome.code == ExitCode.USAGE
        assert "holds none" in outcome.message
        assert "factorctl factorize demo --experts 4" in outcome.message


def test_debug_adds_the_traceback_and_keeps_the_exit_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "Traceback" not in cli("verify", tmp_path).stderr
    monkeypatch.setenv("FACTORCTL_DEBUG", "1")
    outcome = cli("verify", tmp_path)
    assert outcome.code == ExitCode.USAGE
    assert "Traceback (most recent call last)" in outcome.stderr
    assert "error: " in outcome.stderr


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    def broken(path: Path) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("factorctl.pipeline.inspect.inspect.inspect_checkpoint", broken)
    with pytest.raises(ZeroDivisionError):
        cli("inspect", checkpoint)


def test_version() -> None:
    outcome = cli("--version")
    assert (outcome.code, outcome.stdout) == (0, f"factorctl {factorctl.__version__}\n")


# inspect


def test_inspect_says_what_is_here(checkpoint: Path) -> None:
    found = cli("inspect", checkpoint, "--format", "json").json
    assert (found["kind"], found["stage"], found["parent"]) == ("native", "factorize", None)
    assert found["factored"]["notation"] == "1R4E2K+S12"
    assert found["strategy"]["name"] == "clustered"
    assert found["strategy"]["reference"]
    assert found["source"]["id"] == "llama-biases"
    assert found["source"]["model_type"] == "llama"
    assert found["calibration"]["tokens"] == 1024
    assert found["manifest_sha256"] == read_manifest(checkpoint).sha256
    assert len(found["layers"]) == 2
    assert found["largest_load"] >= 1
    assert found["idle_experts"] == [
        [layer, expert]
        for layer, record in enumerate(found["layers"])
        for expert, share in enumerate(record["expert_load"])
        if share < 0.01 * 2 / 4
    ]
    text = cli("inspect", checkpoint).stdout
    assert "even shares" in text
    for words in ("1R4E2K+S12", "clustered", "llama-biases", "1,024 tokens", "softmax, fitted"):
        assert words in text


def test_inspect_weighs_one_layer_s_experts(checkpoint: Path) -> None:
    found = cli("inspect", checkpoint, "--layer", 1, "--format", "json").json
    assert [group["expert"] for group in found["groups"]] == ["shared", 0, 1, 2, 3]
    assert [group["neurons"] for group in found["groups"]] == [12, 9, 9, 9, 9]
    for share in ("down_share", "gate_share"):
        assert sum(group[share] for group in found["groups"]) == pytest.approx(1)
    assert found["record"]["refit"]["error_after"] <= found["record"]["refit"]["error_before"]
    assert "Layer 1 of" in cli("inspect", checkpoint, "--layer", 1).stdout


@pytest.mark.parametrize("layer", [-1, 2, 99])
def test_inspect_refuses_a_layer_that_is_not_there(layer: int, checkpoint: Path) -> None:
    outcome = cli("inspect", checkpoint, "--layer", layer)
    assert outcome.code == ExitCode.USAGE
    assert f"--layer {layer} is not in this model" in outcome.message
    assert "layers 0 to 1" in outcome.message


# verify


def test_verify_a_whole_checkpoint(checkpoint: Path) -> None:
    result = cli("verify", checkpoint, "--identity", "--format", "json").json
    assert result["checkpoint"] == str(checkpoint)
    assert result["files"] == len(read_manifest(checkpoint).files)
    assert result["tensors"] > 20
    assert result["identity_error"] < 1e-5
    assert cli("verify", checkpoint, "--format", "json").json["identity_error"] is None
    text = cli("verify", checkpoint, "--identity")
    assert "all hashes match" in text.stdout
    assert "every one accounted for" in text.stdout
    assert "all experts on against the same neurons in one dense FFN: " in text.stdout
    assert "they are no longer the source's, after a refit or training" in text.stdout
    assert result["holds_dense_values"] is False


def flip_a_bit(copy: Path) -> str:
    shard = sorted(copy.glob("model-*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    return "has sha256"


def shorten(copy: Path) -> str:
    (copy / "tokenizer.json").write_bytes((copy / "tokenizer.json").read_bytes()[:-1])
    return "bytes; its manifest says"


def remove(copy: Path) -> str:
    (copy / "config.json").unlink()
    return "config.json, named by factorctl.json, is missing"


def add_shard(copy: Path) -> str:
    shutil.copy(next(copy.glob("model-*.safetensors")), copy / "model-00009-of-00009.safetensors")
    return "model-00009-of-00009.safetensors is not in the manifest"


def link_out(copy: Path) -> str:
    (copy / "config.json").rename(copy.parent / "config.json")
    (copy / "config.json").symlink_to(copy.parent / "config.json")
    return "symbolic link that leads out"


def damage_manifest(copy: Path) -> str:
    (copy / "factorctl.json").write_text("{")
    return "is not valid JSON"


@pytest.mark.parametrize("damage", [flip_a_bit, shorten, remove, add_shard, link_out, damage_manifest])
def test_verify_names_what_is_not_as_promised(damage: object, copy: Path) -> None:
    words = damage(copy)  # type: ignore[operator]
    outcome = cli("verify", copy)
    assert outcome.code == ExitCode.INTEGRITY
    assert words in outcome.message
    assert outcome.stdout == ""
    with pytest.raises(factorctl.errors.IntegrityError):
        factorctl.load(copy)


def test_verify_a_directory_that_is_no_checkpoint(dense_source: DenseSource, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, words in (
        (dense_source(), "holds no factorctl.json"),
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "file", "is a file, not a checkpoint directory"),
    ):
        outcome = cli("verify", path)
        assert outcome.code == ExitCode.USAGE
        assert words in outcome.message


def test_verify_identity_fails_on_a_wrong_layer(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any) -> DenseFFN:
        whole = unslice_ffn(*arguments)
        return replace(whole, down_DF=whole.down_DF * 1.01)

    monkeypatch.setattr("factorctl.pipeline.inspect.verify.unslice_ffn", wrong)
    outcome = cli("verify", checkpoint, "--identity")
    assert outcome.code == ExitCode.INTEGRITY
    assert "layer 0: all experts on differ from the dense layer" in outcome.message


# plugins, doctor


def test_plugins_lists_strategies_and_aliases() -> None:
    outcome = cli("plugins", "--format", "json")
    assert outcome.code == ExitCode.DONE
    strategies = {row["name"]: row for row in outcome.json["strategies"]}
    assert strategies.keys() >= {"contiguous", "permuted", "clustered"}
    assert "by" in strategies["clustered"]["options"]
    assert all(row["error"] is None and row["reference"] for row in strategies.values())
    assert outcome.json["aliases"] == dict(ALIASES)
    assert "meta/TinyLlama" in cli("plugins").stdout


def test_doctor_reports_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("factorctl.pipeline.inspect.installation._hub_state", lambda: "reachable")
    found = cli("doctor", "--workspace", tmp_path / "not" / "yet", "--format", "json").json
    assert found["factorctl"] == factorctl.__version__
    assert found["libraries"]["torch"] == torch.__version__.split("+")[0] or found["libraries"]["torch"]
    assert found["cores"] >= 1
    assert 0 < found["memory_available_bytes"] <= found["memory_bytes"]
    assert found["disk_free_bytes"] > 0
    assert found["hub"] == "reachable"
    assert not (tmp_path / "not").exists()
    assert "This machine" in cli("doctor").stdout


@pytest.mark.parametrize("reason", [None, "no C++ compiler (c++) is installed"])
def test_doctor_says_whether_the_cpu_kernel_runs(reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("factorctl.pipeline.inspect.installation._hub_state", lambda: "reachable")
    monkeypatch.setattr("factorctl.pipeline.inspect.installation.reason_without", lambda: reason)
    assert cli("doctor", "--format", "json").json["no_kernel"] == reason
    assert ("compiled" if reason is None else "torch computes alone") in cli("doctor").stdout


def test_doctor_says_when_the_hub_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    def unreachable(*arguments: object, **options: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(HfApi, "model_info", unreachable)
    hub = cli("doctor", "--format", "json").json["hub"]
    assert "not reachable" in hub
    assert "demo" in hub


# the manifest


def test_the_manifest_accounts_for_the_work_and_holds_no_times(checkpoint: Path, dense_source: DenseSource) -> None:
    raw = json.loads((checkpoint / "factorctl.json").read_text())
    assert raw["schema_version"] == 1
    assert set(raw["files"]) == {path.name for path in checkpoint.iterdir()} - {"factorctl.json"}
    assert raw["source"]["files"]["model.safetensors"]["size"] > 0
    assert raw["config"]["strategy"] == "clustered"
    assert raw["config"]["seed"] == 0
    assert not raw["config"].keys() & {"out", "workspace", "overwrite"}
    assert len({layer["permutation_sha256"] for layer in raw["details"]["layers"]}) == 2
    assert raw["libraries"].keys() >= {"torch", "transformers"}
    assert "seconds" not in json.dumps(raw)
    card = (checkpoint / "README.md").read_text()
    assert "1R4E2K+S12" in card
    assert "factorctl.load" in card


def test_tokenizer_and_generation_config_travel_byte_for_byte(checkpoint: Path, dense_source: DenseSource) -> None:
    source = dense_source("llama-biases")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (checkpoint / name).read_bytes() == (source / name).read_bytes()


def test_the_same_work_gives_the_same_bytes_and_another_seed_others(dense_source: DenseSource, tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        factorize_quietly(weights_only(dense_source(), tmp_path / name, strategy="permuted", seed=seed))
    assert directory_bytes(tmp_path / "a") == directory_bytes(tmp_path / "b")
    shards = [{k: v for k, v in directory_bytes(tmp_path / n).items() if k.startswith("model-")} for n in "ac"]
    assert shards[0] != shards[1]
    assert leftovers(tmp_path / "a") == []
