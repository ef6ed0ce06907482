"""The command: what it prints, writes and refuses; that nothing is published which does not compute the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import DenseSource
from support.command_line import cli
from support.exporting import ask_about, export_unchecked, largest_difference, make_native
from support.tiny import leftovers, make_source

from factorctl.checkpoint.manifest import check_files, read_manifest
from factorctl.checkpoint.reader import CheckpointReader
from factorctl.config.export import ExportConfig
from factorctl.errors import ResourceError
from factorctl.exporting import push as push_module
from factorctl.exporting.check import stock_process
from factorctl.exporting.check.comparison import Agreement
from factorctl.exporting.jobs import Verified
from factorctl.exporting.stock.folding import Folding
from factorctl.exporting.stock.writer import SafetensorsWriter


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    directory = tmp_path_factory.mktemp("native")
    return make_native(directory, "llama", text_file, source=make_source(directory / "dense", "llama-tied"))


def test_the_command_reports_and_publishes_what_it_compared(native: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = cli("export", native, "--out", out, "--format", "json")
    assert outcome.code == 0, outcome.stderr
    result = outcome.json
    assert {"path", "format", "architecture", "max_logit_error", "top1_agreement", "kl", "files", "bytes"} <= set(
        result
    )
    assert result["architecture"] == "MixtralForCausalLM"
    assert result["max_logit_error"] < 1e-4
    assert result["top1_agreement"] == 1
    assert result["kl"] < 1e-6
    assert result["scale_rounding"] == 0
    manifest = read_manifest(out)
    assert (manifest.kind, manifest.stage) == ("export", "export")
    assert manifest.parent == read_manifest(native).sha256
    assert len(list(check_files(out, manifest))) == result["files"]
    assert result["bytes"] == sum(path.stat().st_size for path in out.iterdir() if path.name != "factorctl.json")
    for name in ("tokenizer.json", "generation_config.json"):
        assert (out / name).read_bytes() == (native / name).read_bytes()
    card = (out / "README.md").read_text()
    for expected in ("1R4E2K", "MixtralForCausalLM", "arxiv.org/abs/2408.11855", "factorctl export CHECKPOINT"):
        assert expected in card
    assert cli("verify", out).code == 0
    assert not leftovers(out)


def test_text_output_names_the_figures(native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agreement = Agreement(512, 1.5e-5, 1e-6, 0.9875, 2e-9)
    monkeypatch.setattr(SafetensorsWriter, "verify", lambda *_: Verified("transformers", agreement, 10**9))
    outcome = cli("export", native, "--to", "dense", "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.stderr
    for expected in ("1.5e-05", "98.75%", "2e-09", "the source, bit for bit", "1.00 GB", "transformers, 512 tokens"):
        assert expected in outcome.stdout


def test_dry_run_writes_nothing(native: Path, tmp_path: Path) -> None:
    outcome = cli("export", native, "--out", tmp_path / "out", "--dry-run", "--format", "json")
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["architecture"] == "MixtralForCausalLM"
    assert not list(tmp_path.iterdir())


def test_an_export_that_computes_something_else_is_not_published(
    native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Folding.router
    monkeypatch.setattr(Folding, "router", lambda self, layer, router_ND: right(self, layer, router_ND).neg())
    outcome = cli("export", native, "--out", tmp_path / "out")
    assert outcome.code == 1
    assert "the export does not compute what the native model computes" in outcome.message
    assert "nothing was published" in outcome.message
    assert not list(tmp_path.iterdir())


def test_an_export_that_lacks_a_tensor_is_not_published(
    native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from factorctl.exporting.stock import tensors as stock_tensors

    right = stock_tensors.ffn_tensors

    def without_a_router(*arguments: Any) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in right(*arguments).items() if not name.endswith("moe.gate.weight")}

    monkeypatch.setattr(stock_tensors, "ffn_tensors", without_a_router)
    outcome = cli("export", native, "--out", tmp_path / "out")
    assert outcome.code == 1
    assert "stock transformers (MixtralForCausalLM) reports missing_keys" in outcome.message
    assert "model.layers.0.mlp.gate.weight (2 in all)" in outcome.message
    assert not list(tmp_path.iterdir())


def test_the_stock_process_cannot_import_factorctl() -> None:
    program = (
        f"import runpy, sys; ns = runpy.run_path({stock_process.__file__!r}); "
        "sys.meta_path.insert(0, ns['RefuseFactorctl']()); import factorctl.config.common"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert finished.returncode == 1
    assert "ImportError: factorctl must not be imported here" in finished.stderr


def test_shards_hold_no_more_than_was_asked(native: Path, tmp_path: Path) -> None:
    limit = 20_000
    export_unchecked(ExportConfig(checkpoint=native, out=tmp_path / "out", max_shard_bytes=limit))
    reader = CheckpointReader(tmp_path / "out")
    sizes = {file: sum(e.nbytes for e in reader.entries.values() if e.file == file) for file in reader.files}
    assert len(sizes) > 2
    assert max(sizes.values()) <= limit
    answers = ask_about({"out": tmp_path / "out"})
    assert largest_difference(native, answers["out"]) < 1e-4


@pytest.mark.parametrize("target", ["hf", "dense"])
def test_an_untied_head_stands_beside_the_embeddings(target: str, native: Path, tmp_path: Path) -> None:
    config = ExportConfig(checkpoint=native, target=target, out=tmp_path / "out", untie_lm_head=True)  # type: ignore[arg-type]
    export_unchecked(config)
    reader = CheckpointReader(tmp_path / "out")
    assert torch.equal(reader.read("lm_head.weight"), reader.read("model.embed_tokens.weight"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_another_dtype_is_written_and_named(native: Path, tmp_path: Path) -> None:
    export_unchecked(ExportConfig(checkpoint=native, out=tmp_path / "out", dtype="bfloat16"))
    entries = CheckpointReader(tmp_path / "out").entries.values()
    assert {entry.dtype for entry in entries} == {torch.bfloat16}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"


def test_a_hard_gate_over_several_experts_comes_near(
    dense_source: DenseSource, tmp_path: Path, text_file: Path
) -> None:
    native = make_native(tmp_path, "llama", text_file, source=dense_source(), top_k=2, gate="hard")
    result = export_unchecked(ExportConfig(checkpoint=native, out=tmp_path / "out"))
    assert result.selection_agreement is not None
    assert result.selection_agreement > 0.99
    assert result.gate_error is not None
    assert result.gate_error < 1e-3
    assert largest_difference(native, ask_about({"out": tmp_path / "out"})["out"]) < 2e-2
    refused = cli("export", native, "--out", tmp_path / "exact", "--exact")
    assert refused.code == 2
    assert "gate = 'hard'" in refused.message


def test_a_scale_that_is_no_power_of_two_reports_its_rounding(
    dense_source: DenseSource, tmp_path: Path, text_file: Path
) -> None:
    source = dense_source(dtype=torch.bfloat16)
    native = make_native(tmp_path, "llama", text_file, source=source, top_k=3)
    result = export_unchecked(ExportConfig(checkpoint=native, out=tmp_path / "out"))
    assert result.scale_rounding is not None
    assert 1e-4 < result.scale_rounding < 4e-3


class FakeHub:
    """Stands in for the Hub's API and keeps what it was asked."""

    calls: list[tuple[str, dict[str, Any]]]

    def create_repo(self, repo: str, **options: Any) -> SimpleNamespace:
        self.calls.append(("create_repo", {"repo": repo, **options}))
        return SimpleNamespace(repo_id=f"someone/{repo.rpartition('/')[2]}")

    def upload_folder(self, **options: Any) -> SimpleNamespace:
        names = sorted(path.name for path in Path(options["folder_path"]).iterdir())
        self.calls.append(("upload_folder", {**options, "names": names}))
        return SimpleNamespace(oid="0123abc")


def test_push_uploads_the_finished_export_and_prints_the_commit(
    native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeHub.calls = []
    monkeypatch.setattr(push_module, "HfApi", FakeHub)
    config = ExportConfig(checkpoint=native, out=tmp_path / "out", push="someone/tiny", private=True)
    result = export_unchecked(config)
    assert result.commit == "0123abc"
    (_, created), (_, uploaded) = FakeHub.calls
    assert created["private"] is True
    assert uploaded["repo_id"] == "someone/tiny"
    assert {"config.json", "factorctl.json", "README.md", "model.safetensors.index.json"} <= set(uploaded["names"])


def test_an_upload_that_breaks_off_leaves_the_export_and_says_how_to_go_on(
    native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unplugged(FakeHub):
        def upload_folder(self, **options: Any) -> SimpleNamespace:
            raise ConnectionError("the cable is out")

    FakeHub.calls = []
    monkeypatch.setattr(push_module, "HfApi", Unplugged)
    out = tmp_path / "out"
    with pytest.raises(Exception, match="the upload to someone/tiny broke off: the cable is out") as broken:
        export_unchecked(ExportConfig(checkpoint=native, out=out, push="someone/tiny"))
    assert f"hf upload someone/tiny {out}" in str(broken.value)
    assert read_manifest(out).kind == "export"


def test_no_network_is_called_no_network_before_anything_is_converted(
    native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unplugged(FakeHub):
        def create_repo(self, repo: str, **options: Any) -> SimpleNamespace:
            raise ConnectionError("Name or service not known")

    monkeypatch.setattr(push_module, "HfApi", Unplugged)
    with pytest.raises(ResourceError, match="the hub cannot be reached for someone/tiny: Name or service") as caught:
        export_unchecked(ExportConfig(checkpoint=native, out=tmp_path / "out", push="someone/tiny"))
    assert caught.value.hint == "export without --push and upload later with `hf upload`"
    assert not (tmp_path / "out").exists()


def test_reports_on_the_checkpoint_enter_the_card(native: Path, tmp_path: Path) -> None:
    sha256 = read_manifest(native).sha256
    workspace = tmp_path / "runs"
    workspace.mkdir()
    for name, about, perplexity in (("eval", sha256, 31.25), ("other", "0" * 64, 1.0)):
        measured = {"perplexity": {"wikitext": {"dense": 20.5, "model": perplexity}}, "tasks": {}}
        report = {"manifest_sha256": about, **measured, "average": {"kept": None}}
        (workspace / f"{name}.json").write_text(json.dumps(report))
    export_unchecked(ExportConfig(checkpoint=native, out=tmp_path / "out", workspace=workspace))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| perplexity, wikitext | 20.5 | 31.25 | |" in card
    assert "| perplexity, wikitext | 20.5 | 1 | |" not in card


@pytest.mark.parametrize("size", ["0", "2 miles", "-1GB"])
def test_a_shard_size_that_is_none_is_refused(size: str, native: Path, tmp_path: Path) -> None:
    outcome = cli("export", native, "--out", tmp_path / "out", f"--max-shard-size={size}")
    assert outcome.code == 2
    assert f"--max-shard-size {size!r} is no size" in outcome.message


@pytest.mark.parametrize("option", [["--quant", "q8_0"], ["--verify-gguf"]])
def test_an_option_that_would_be_ignored_is_refused(option: list[str], native: Path, tmp_path: Path) -> None:
    outcome = cli("export", native, "--out", tmp_path / "out", *option)
    assert outcome.code == 2
    assert f"{' '.join(option)} has no meaning with --to hf" in outcome.message


def test_an_export_is_not_exported_again(native: Path, tmp_path: Path) -> None:
    export_unchecked(ExportConfig(checkpoint=native, out=tmp_path / "out"))
    outcome = cli("export", tmp_path / "out", "--out", tmp_path / "again")
    assert outcome.code == 2
    assert "is an export, not a native checkpoint" in outcome.message
