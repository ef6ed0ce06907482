"""What else may go wrong, line by line: small disks and memories, bad numbers, sizes that do not fit, plugins, the Hub.

Kills, full disks, damage, hostile files, signals and races have files of their own; what training meets on its way
(losses that are no numbers, too little GPU memory, another configuration on resuming) is in test_finetune_resume.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from bench import Bench
from faults.tally import Tally
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled
from injection import die_at
from safetensors.torch import load, load_file, save, save_file
from sandbox import Sandbox
from standins import without_engines
from support.command_line import Outcome, cli
from support.tiny import directory_bytes, leftovers
from verbs import ROWS, each_row

from factorctl.checkpoint import hub_source
from factorctl.checkpoint.manifest import MANIFEST_NAME
from factorctl.checkpoint.reader import INDEX_NAME, CheckpointReader
from factorctl.contracts import PARTITION_ENTRY_POINTS
from factorctl.errors import ExitCode
from factorctl.exporting.check import stock_proof
from factorctl.exporting.check.stock import StockAnswer
from factorctl.training import load_watch

READS = ("verify", "inspect", "finetune", "export", "profile", "eval")


def read_by(verb: str, checkpoint: Path, bench: Bench, out: Path) -> Outcome:
    """A verb that reads a checkpoint, with what else it needs."""
    options: dict[str, list[object]] = {
        "finetune": ["--tokens", 64, "--data", bench.text, "--block-length", 32, "--out", out],
        "export": ["--to", "dense", "--out", out],
        "profile": ["--no-latency", "--data", "random", "--out", out],
        "eval": ["--data", bench.text, "--data-tokens", 100, "--out", out],
    }
    with without_engines():
        return cli(verb, checkpoint, *options.get(verb, []))


def factorize(source: object, out: Path, *options: object) -> Outcome:
    return cli("factorize", source, "--experts", 4, "--router", "random", "--out", out, *options)


def test_a_rerun_says_what_it_goes_on_from_and_what_it_leaves(bench: Bench, tmp_path: Path, tally: Tally) -> None:
    place = bench.place("finetune", tmp_path / "place")
    point = bench.points("finetune").index("rename runs/out.training/state-00000004")
    with tally.case("SIGKILL, what the next run says", "finetune"):
        assert place.run(die_at(point)).status == -9
        fate = place.finish()
        assert "resuming from step 2 (128 tokens); ignored incomplete state-00000004" in fate.message


@each_row()
def test_a_disk_that_is_too_small_is_found_out_first(name: str, bench: Bench, tmp_path: Path, tally: Tally) -> None:
    if ROWS[name].repeats:
        pytest.skip("it writes no weights of its own")
    usage = shutil.disk_usage("/")._replace(free=10)
    place = bench.place(name, tmp_path / "place")
    with tally.case("disk too small, found out first", name):
        fate = place.run(prepare=lambda: setattr(shutil, "disk_usage", lambda _: usage))
        assert fate.code == ExitCode.RESOURCES, fate.message
        assert "needs 0.0 GB; 0.0 GB are free" in fate.message
        assert "hint: free space, or choose another --out" in fate.message
        assert not list(place.out.parent.iterdir())


@pytest.mark.parametrize("name", ["factorize", "finetune", "eval", "export hf", "export gguf", "export dense"])
def test_a_memory_that_is_too_small_is_found_out_first(name: str, bench: Bench, tmp_path: Path, tally: Tally) -> None:
    memory = psutil.virtual_memory()._replace(available=1000)
    place = bench.place(name, tmp_path / "place")
    with tally.case("memory too small, found out first", name):
        fate = place.run(prepare=lambda: setattr(psutil, "virtual_memory", lambda: memory))
        assert fate.code == ExitCode.RESOURCES, fate.message
        assert "GB of memory are needed" in fate.message
        assert "0.0 GB are available" in fate.message
        assert "hint: " in fate.message
        assert not list(place.out.parent.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named(value: float, bench: Bench, tmp_path: Path, tally: Tally) -> None:
    source = Path(shutil.copytree(bench.source, tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][1, 2] = value
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with tally.case("NaN or Inf in a weight", "factorize"):
        outcome = factorize(source, tmp_path / "out")
        assert outcome.code == ExitCode.INTEGRITY
        assert "tensor model.layers.1.mlp.up_proj.weight in" in outcome.message
        assert "holds NaN or Inf" in outcome.message
        assert not (tmp_path / "out").exists()
    native = Sandbox(tmp_path / "native", bench.base)
    name, shard = "model.layers.1.mlp.down", "model-00003-of-00003.safetensors"
    changed = load((native.inside / shard).read_bytes())
    changed[name][1, 2] = value
    native.vouch(shard, save(changed, {"format": "pt"}))
    for verb in ("finetune", "export", "profile", "eval"):
        with tally.case("NaN or Inf in a weight", verb):
            outcome = read_by(verb, native.inside, bench, tmp_path / "out")
            assert outcome.code == ExitCode.INTEGRITY, f"{verb}: {outcome.message}"
            assert f"tensor {name} in" in outcome.message
            assert not (tmp_path / "out" / MANIFEST_NAME).exists()


MISFITS: dict[str, tuple[list[object], dict[str, object], str]] = {
    "N does not divide F": (["--experts", 5], {}, "try 4 or 6"),
    "K > N": (["--top-k", 5], {}, "from 0 to 4"),
    "activation": ([], {"hidden_act": "softmax"}, "activation 'softmax' cannot be split"),
    "no gate": ([], {"model_type": "gpt2"}, "supported: llama"),
    "rope": ([], {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "spiral"),
    "quantised": ([], {"quantization_config": {"quant_method": "gptq"}}, "already quantised (gptq)"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_cannot_be_split_is_refused_before_a_weight_is_read(
    misfit: str, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    options, changes, said = MISFITS[misfit]
    source = Path(shutil.copytree(bench.source, tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | changes))
    monkeypatch.setattr(CheckpointReader, "read", lambda *_: pytest.fail("a weight was read"))
    with tally.case("sizes or kinds that do not fit", misfit):
        outcome = factorize(source, tmp_path / "out", *options)
        assert outcome.code in (ExitCode.USAGE, ExitCode.INTEGRITY), outcome
        assert said in outcome.message
        assert "Traceback" not in outcome.stderr


def _move(index: dict[str, str], one: str, other: str) -> None:
    index[one], index[other] = index[other], index[one]


DISAGREEMENTS: dict[str, Callable[[dict[str, str], str, str], object]] = {
    "in another shard": _move,
    "not listed": lambda index, one, other: index.pop(one),
    "listed, not there": lambda index, one, other: index.update({f"{one}.more": index[one]}),
    "shard not there": lambda index, one, other: index.update({one: "model-00099-of-00099.safetensors"}),
}


@pytest.mark.parametrize("fault", DISAGREEMENTS)
@pytest.mark.parametrize("kind", ["native", "dense"])
def test_an_index_that_disagrees_with_the_shards(
    kind: str, fault: str, bench: Bench, tmp_path: Path, tally: Tally
) -> None:
    """The file is named, and the tensor; nothing is made up for it."""
    sandbox = Sandbox(tmp_path / kind, bench.base if kind == "native" else bench.source)
    if kind == "dense":
        _shard(sandbox.inside)
    index = json.loads((sandbox.inside / INDEX_NAME).read_text())
    one = "model.layers.0.self_attn.q_proj.weight"
    DISAGREEMENTS[fault](index["weight_map"], one, "model.embed_tokens.weight")
    content = json.dumps(index).encode()
    with tally.case("index and shards disagree", kind):
        if kind == "native":
            sandbox.vouch(INDEX_NAME, content)
            outcome = read_by("export", sandbox.inside, bench, tmp_path / "out")
        else:
            (sandbox.inside / INDEX_NAME).write_bytes(content)
            outcome = factorize(sandbox.inside, tmp_path / "out")
        assert outcome.code == ExitCode.INTEGRITY, outcome
        named = ("model-00099",) if fault == "shard not there" else (one, "model.embed_tokens.weight")
        assert any(name in outcome.message for name in named)
        assert ".safetensors" in outcome.message
        assert not (tmp_path / "out").exists()


def _shard(source: Path) -> None:
    """Two shards and an index in place of one file."""
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    weight_map = {name: f"model-{1 + ('layers' in name):05d}-of-00002.safetensors" for name in tensors}
    for file in set(weight_map.values()):
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        save_file(part, source / file, metadata={"format": "pt"})
    (source / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@each_row()
def test_a_result_that_exists_is_kept(name: str, bench: Bench, tmp_path: Path, tally: Tally) -> None:
    if ROWS[name].repeats:
        pytest.skip("a report is written anew by the same command")
    place = bench.place(name, tmp_path / "place", out=bench.made(name))
    before = directory_bytes(place.out)
    with tally.case("output exists", name):
        fate = place.run()
        assert fate.code == ExitCode.USAGE
        assert f"{place.out} exists" in fate.message
        assert "pass --overwrite to replace it once the new one is whole" in fate.message
        assert directory_bytes(place.out) == before
        assert leftovers(place.out) == []


@pytest.mark.parametrize("verb", READS)
def test_a_manifest_of_a_newer_version(verb: str, bench: Bench, tmp_path: Path, tally: Tally) -> None:
    native = Sandbox(tmp_path / "native", bench.base)
    raw = json.loads(native.unsealed_manifest()) | {"schema_version": 99, "tool_version": "9.1"}
    (native.inside / MANIFEST_NAME).write_text(json.dumps(raw))
    with tally.case("manifest of a newer version", verb):
        outcome = read_by(verb, native.inside, bench, tmp_path / "out")
        assert outcome.code == ExitCode.USAGE, outcome
        assert "written by factorctl 9.1" in outcome.message
        assert "upgrade factorctl" in outcome.message


def _refused(kind: type[Exception]) -> Exception:
    response = SimpleNamespace(headers={}, request=None)  # as much of one as the error looks at
    return kind("refused", response=response)  # type: ignore[call-arg]


HUB: dict[str, tuple[Callable[[], Exception], ExitCode, str]] = {
    "gated": (lambda: _refused(GatedRepoError), ExitCode.USAGE, "run `hf auth login`"),
    "offline": (lambda: OfflineModeIsEnabled("offline mode"), ExitCode.RESOURCES, "or try the model `demo`"),
    "dropped": (lambda: ConnectionError("reset"), ExitCode.RESOURCES, "run again when it is (finished files are kept)"),
}


@pytest.mark.parametrize("fault", HUB)
def test_a_hub_that_does_not_give(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally) -> None:
    make, code, said = HUB[fault]

    def refuse(*_: object, **__: object) -> str:
        raise make()

    monkeypatch.setattr(hub_source, "snapshot_download", refuse)
    with tally.case("the Hub does not give", fault):
        outcome = factorize("someone/model", tmp_path / "out")
        assert outcome.code == code, outcome
        assert said in outcome.message
        assert not (tmp_path / "out").exists()


def test_an_expert_that_dies_is_named_with_its_load(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    place = bench.place("finetune", tmp_path / "place")
    with tally.case("router collapse", "finetune"):
        fate = place.run(prepare=lambda: setattr(load_watch, "dead_experts", lambda *_: [(1, 2)]))
        assert fate.code == ExitCode.DONE
        assert "layer 1: expert 2 was chosen by" in fate.message
        assert "of the last 256 tokens (an even share is 50%); raise the balance loss: --loss balance" in fate.message


def test_a_broken_plugin_is_named_and_the_others_work(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    metadata = tmp_path / "site" / "broken-1.2.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.2\n")
    (metadata / "entry_points.txt").write_text(f"[{PARTITION_ENTRY_POINTS}]\nbad = broken_module:Strategy\n")
    (metadata.parent / "broken_module.py").write_text("import not_there_at_all\n")
    monkeypatch.syspath_prepend(str(metadata.parent))
    with tally.case("broken plugin", "plugins"):
        listed = cli("plugins")
        assert listed.code == ExitCode.FAILED
        assert all(name in listed.stdout for name in ("bad", "contiguous", "permuted", "clustered"))
    with tally.case("broken plugin", "factorize"):
        outcome = factorize(bench.source, tmp_path / "out", "--strategy", "bad")
        assert outcome.code == ExitCode.FAILED, outcome
        assert "strategy 'bad' of broken 1.2" in outcome.message
        assert "uninstall broken" in outcome.message
        assert factorize(bench.source, tmp_path / "out", "--strategy", "contiguous").code == ExitCode.DONE


@pytest.mark.parametrize("target", ["hf", "dense"])
def test_an_export_that_computes_something_else_is_not_published(
    target: str, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    def another_model(jobs: Any) -> list[StockAnswer]:
        return [StockAnswer("", [torch.randn(len(ids), 300) for ids in job.question.sequences], 1000) for job in jobs]

    monkeypatch.setattr(stock_proof, "ask_stock", another_model)
    with tally.case("export is not what it should be", f"export {target}"):
        outcome = cli("export", bench.base, "--to", target, "--out", tmp_path / "out")
        assert outcome.code == ExitCode.FAILED, outcome
        assert "the export does not compute what the native model computes" in outcome.message
        assert "nothing was published" in outcome.message
        assert not list(tmp_path.iterdir())
