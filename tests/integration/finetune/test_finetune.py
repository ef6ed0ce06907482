"""`finetune` end to end on tiny models, through the pipeline and through the command line."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.tracking import GeneralTracker
from conftest import DenseSource
from support.tiny import directory_bytes, factorize_quietly, make_source, some_ids, weights_only
from typer.testing import CliRunner

import factorctl
from factorctl.checkpoint import reader as checkpoint_reader
from factorctl.checkpoint.manifest import read_manifest
from factorctl.checkpoint.reader import CheckpointReader
from factorctl.cli.app import app
from factorctl.config.finetune import FinetuneConfig
from factorctl.errors import FactorctlError, IntegrityError, ResourceError, UsageError
from factorctl.ffn.layer import FactoredFFN
from factorctl.ffn.routing import scatter_weights
from factorctl.models.building import factored_ffns
from factorctl.models.loading import open_checkpoint
from factorctl.pipeline.finetune import memory as finetune_memory
from factorctl.pipeline.finetune import model as finetune_model
from factorctl.pipeline.finetune import run as pipeline
from factorctl.pipeline.finetune.plan import plan_finetune
from factorctl.pipeline.finetune.run import FinetuneResult, finetune, rehearse
from factorctl.progress import SilentProgress
from factorctl.training.distiller import Distiller
from factorctl.training.twin_ffn import twins

pytestmark = pytest.mark.usefixtures("no_pictures")


def config(checkpoint: Path, text: Path, out: Path, **changes: Any) -> FinetuneConfig:
    plain = FinetuneConfig(
        tokens=640,
        checkpoint=checkpoint,
        data=str(text),
        block_length=32,
        batch_tokens=128,
        heldout_tokens=128,
        device="cpu",
        out=out,
    )
    return dataclasses.replace(plain, **changes)


def tune(config: FinetuneConfig) -> FinetuneResult:
    return finetune(config, SilentProgress())


def changed_tensors(before: Path, after: Path) -> set[str]:
    """Names of tensors whose values differ, with the layer number cut out."""
    ours, theirs = CheckpointReader(after), CheckpointReader(before)
    assert ours.entries.keys() == theirs.entries.keys()
    changed = {name for name in ours.entries if not torch.equal(ours.read(name), theirs.read(name))}
    return {name.split(".mlp.")[-1] for name in changed}


def test_the_result_is_a_checkpoint_with_its_parent_and_its_story(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    result = tune(config(checkpoint, text, tmp_path / "tuned"))
    manifest, parent = read_manifest(tmp_path / "tuned"), read_manifest(checkpoint)
    assert manifest.stage == "finetune"
    assert manifest.parent == parent.sha256 == result.parent
    assert manifest.source == parent.source
    training = manifest.details["training"]
    assert training["preset"] == "default"
    assert training["tokens"] == result.tokens == 640
    assert len(training["data"]["fingerprint"]) == 64
    assert training["perplexity_after"] == result.perplexity_after
    assert training["retargeted_from_top_k"] is None
    assert manifest.config["lr"] == 5e-4, "half of the FFN is active"
    assert manifest.config["loss_weights"]["kd"] == 1.0
    assert changed_tensors(checkpoint, tmp_path / "tuned") == {"gate_up", "down", "router"}
    model = factorctl.load(tmp_path / "tuned")
    assert model.config.model_type == "llama"
    assert (tmp_path / "tuned" / "tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()


def test_the_same_run_gives_the_same_bytes(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        tune(config(checkpoint, text, tmp_path / name))
    assert directory_bytes(tmp_path / "one") == directory_bytes(tmp_path / "two")


def test_training_helps(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    result = tune(config(checkpoint, text, tmp_path / "tuned", tokens=6400, lr=3e-3))
    assert result.losses["kd"] < 0.25
    lines = [json.loads(line) for line in Path(result.metrics).read_text().splitlines()]
    assert lines[-1]["kd"] < 0.7 * lines[0]["kd"]
    assert result.router_agreement > result.router_agreement_before
    assert Path(result.plot).is_file()


def test_the_stored_router_chooses_and_weighs_as_the_trained_one(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Selection and sharpness are two while they are trained and one linear map in the result."""
    caught: list[dict[int, torch.Tensor]] = []
    batch, genuine = (some_ids(1, 16), torch.arange(16)[None]), pipeline.trained_tensors

    def spy(distiller: Distiller, **options: Any) -> dict[str, torch.Tensor]:
        assert all(math.log2(twin.sharpness.item()) % 1 for twin in twins(distiller.model)), "it has learned"
        caught.append(gates(distiller, [twin.student for twin in twins(distiller.model)]))
        return genuine(distiller, **options)

    @torch.no_grad()
    def gates(run: Callable[..., Any], layers: Iterable[FactoredFFN]) -> dict[int, torch.Tensor]:
        """Each layer's gate weights, zero where an expert is not chosen, [T, N]."""
        found: dict[int, torch.Tensor] = {}
        hooks = [
            ffn.register_forward_pre_hook(
                lambda ffn, x, layer=layer: found.update({layer: scatter_weights(ffn.route(x[0].flatten(0, -2)), 4)})
            )
            for layer, ffn in enumerate(layers)
        ]
        run(*batch)
        for hook in hooks:
            hook.remove()
        return found

    monkeypatch.setattr(pipeline, "trained_tensors", spy)
    tune(config(checkpoint, text, tmp_path / "tuned", sharpness_lr=0.05))
    loaded = factorctl.load(tmp_path / "tuned")
    trained, stored = (
        caught[0],
        gates(lambda ids, positions: loaded(ids, position_ids=positions), factored_ffns(loaded)),
    )
    assert trained.keys() == stored.keys() == {0, 1}
    for layer, gates_TN in stored.items():
        assert torch.equal(gates_TN > 0, trained[layer] > 0)
        torch.testing.assert_close(gates_TN, trained[layer], atol=1e-5, rtol=1e-5)


def test_heal_tokens_train_layer_by_layer_first(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    result = tune(config(checkpoint, text, tmp_path / "tuned", tokens=1280, heal_tokens=640, lr=3e-3))
    lines = [json.loads(line) for line in Path(result.metrics).read_text().splitlines()]
    assert ["kd" in line for line in lines] == [False] * 5 + [True] * 5
    assert lines[4]["mse"] < lines[0]["mse"]
    assert result.losses["kd"] < result.losses_before["kd"]


def test_factorllm_trains_with_a_hard_gate_at_the_papers_scale(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    tune(config(checkpoint, text, tmp_path / "tuned", preset="factorllm", loss_weights={"par": 1.0}))
    spec = open_checkpoint(tmp_path / "tuned").spec
    assert (spec.gate, spec.scale, spec.scale_a(0)) == ("hard", "paper", 2.0)
    assert changed_tensors(checkpoint, tmp_path / "tuned") == {"gate_up", "down", "router"}


def test_another_top_k_is_allowed_and_recorded(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    result = tune(config(checkpoint, text, tmp_path / "tuned", top_k=1))
    assert result.notation == "1R4E1K"
    assert read_manifest(tmp_path / "tuned").details["training"]["retargeted_from_top_k"] == 2
    assert open_checkpoint(tmp_path / "tuned").spec.shape.top_k == 1


def test_with_all_experts_on_before_equals_dense(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    result = tune(config(checkpoint, text, tmp_path / "tuned", top_k=4))
    assert result.perplexity_before == pytest.approx(result.perplexity_dense, rel=1e-6)
    assert result.router_agreement is None
    assert changed_tensors(checkpoint, tmp_path / "tuned") == {"gate_up", "down"}


def test_the_static_control_trains_the_shared_neurons_alone(refitted: Path, text: Path, tmp_path: Path) -> None:
    result = tune(config(refitted, text, tmp_path / "tuned", top_k=0, weight_decay=0.0))
    assert result.notation == "1R4E0K+S12"
    assert changed_tensors(refitted, tmp_path / "tuned") == {"shared_gate_up", "down"}
    before, after = (CheckpointReader(path).read("model.layers.0.mlp.down") for path in (refitted, tmp_path / "tuned"))
    assert torch.equal(before[:, 12:], after[:, 12:]), "columns of experts that never run keep their values"


@pytest.mark.parametrize(("train", "changed"), [("router", {"router"}), ("experts", {"gate_up", "down"})])
def test_parts_can_be_trained_alone(
    checkpoint: Path, text: Path, tmp_path: Path, train: Any, changed: set[str]
) -> None:
    tune(config(checkpoint, text, tmp_path / "tuned", train=train))
    assert changed_tensors(checkpoint, tmp_path / "tuned") == changed


def test_a_router_warmup_leaves_the_experts_alone_at_first(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    tune(config(checkpoint, text, tmp_path / "all-of-it", router_warmup=640))
    assert changed_tensors(checkpoint, tmp_path / "all-of-it") == {"router"}
    tune(config(checkpoint, text, tmp_path / "half", router_warmup=320))
    assert changed_tensors(checkpoint, tmp_path / "half") == {"gate_up", "down", "router"}


def test_the_teacher_of_changed_values_is_the_dense_source(
    refitted: Path, dense_source: DenseSource, text: Path, tmp_path: Path
) -> None:
    dense = tune(config(refitted, text, tmp_path / "one"))
    assert read_manifest(tmp_path / "one").details["training"]["teacher"] == read_manifest(refitted).source["id"]
    again = tune(config(tmp_path / "one", text, tmp_path / "two", teacher=str(dense_source())))
    assert again.perplexity_dense == pytest.approx(dense.perplexity_dense, rel=1e-6)
    assert again.perplexity_before == pytest.approx(dense.perplexity_after, rel=1e-6)


def moved(checkpoint: Path, to: Path) -> Path:
    """The same checkpoint whose dense source has gone."""
    shutil.copytree(checkpoint, to)
    manifest = json.loads((to / "factorctl.json").read_text())
    manifest["source"]["path"] = "gone"
    del manifest["sha256"]  # the seal, which older manifests do not have
    (to / "factorctl.json").write_text(json.dumps(manifest))
    return to


def test_a_lost_or_wrong_teacher_is_refused(refitted: Path, text: Path, tmp_path: Path) -> None:
    lost = moved(refitted, tmp_path / "lost")
    with pytest.raises(UsageError, match=r"(?s)was not found: gone is not there any more.*name it with --teacher"):
        tune(config(lost, text, tmp_path / "tuned"))
    other = make_source(tmp_path / "other", seed=5)
    with pytest.raises(UsageError, match=r"is not the dense model that .*lost was made from"):
        tune(config(lost, text, tmp_path / "tuned", teacher=str(other)))


def test_bfloat16_and_checkpointing_train_too(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    exact = tune(config(checkpoint, text, tmp_path / "exact"))
    rough = tune(config(checkpoint, text, tmp_path / "rough", precision="bfloat16", gradient_checkpointing=True))
    assert rough.perplexity_after == pytest.approx(exact.perplexity_after, rel=0.05)
    assert CheckpointReader(tmp_path / "rough").entry("model.layers.0.mlp.gate_up").dtype == torch.float32


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "factorllm"},
        {"straight_through": True},
        {"router_refresh": 256, "refresh_target": "benefits"},
        {"heal_tokens": 256},
        {"labels_from": "student"},
        {"top_k": 0},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_way_to_train_does_in_bfloat16_which_is_a_gpus_default(
    options: dict[str, Any], refitted: Path, text: Path, tmp_path: Path
) -> None:
    options = {"heldout_tokens": 512, **options}  # on 128 a few flipped choices are worth 6%
    exact = tune(config(refitted, text, tmp_path / "exact", **options))
    rough = tune(config(refitted, text, tmp_path / "rough", precision="bfloat16", **options))
    assert rough.perplexity_after == pytest.approx(exact.perplexity_after, rel=0.05)


def test_a_half_precision_teacher(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    exact = tune(config(checkpoint, text, tmp_path / "exact"))
    half = tune(config(checkpoint, text, tmp_path / "half", teacher_quant="bf16"))
    assert half.perplexity_dense == pytest.approx(exact.perplexity_dense, rel=0.02)
    assert half.perplexity_dense != exact.perplexity_dense


def test_data_of_its_own(checkpoint: Path, tmp_path: Path) -> None:
    result = tune(config(checkpoint, Path("self"), tmp_path / "tuned"))
    sources = read_manifest(tmp_path / "tuned").details["training"]["data"]["sources"]
    assert [source["kind"] for source in sources] == ["self"]
    assert result.epochs == pytest.approx(1.0)


def test_several_epochs_are_said_and_too_many_refused(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    progress = SilentProgress()
    finetune(config(checkpoint, text, tmp_path / "tuned", tokens=12_800), progress)
    assert any("make 1." in note and "epochs" in note for note in progress.notes)
    with pytest.raises(UsageError, match=r"would go 1\.\d times through the text, which gives .*; --max-epochs is 1"):
        tune(config(checkpoint, text, tmp_path / "more", tokens=12_800, max_epochs=1))


def test_the_memory_is_stated_first(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    progress = SilentProgress()
    finetune(config(checkpoint, text, tmp_path / "tuned"), progress)
    assert progress.notes[0].startswith("expected memory 0.70 GB on cpu: process 0.70")


def test_a_rehearsal_writes_nothing(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    found = rehearse(config(checkpoint, text, tmp_path / "place" / "tuned"), SilentProgress())
    assert not (tmp_path / "place").exists()
    assert (found.steps, found.tokens) == (5, 640)
    assert found.tokens_per_second > 0
    assert found.expected_memory["teacher"] == found.expected_memory["trained weights"] - 2 * 4 * 32 * 4


def test_a_rehearsal_of_slow_steps_times_one(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[float] = []
    monkeypatch.setattr("factorctl.pipeline.finetune.run._timed_step", lambda *_: steps.append(400.0) or 400.0)
    found = rehearse(config(checkpoint, text, tmp_path / "tuned"), SilentProgress())
    assert len(steps) == 1
    assert found.tokens_per_second == pytest.approx(128 / 400, abs=0.05)


BAD: dict[str, tuple[dict[str, Any], type[FactorctlError], str]] = {
    "no tokens": ({"tokens": 0}, UsageError, "--tokens 0 leaves nothing to train on"),
    "too many experts": ({"top_k": 9}, UsageError, "--top-k 9 does not fit 4 experts"),
    "no active neuron": ({"top_k": 0}, UsageError, "--top-k 0 leaves no active neuron"),
    "no such data": ({"data": "nowhere.jsonl"}, UsageError, "--data 'nowhere.jsonl' was not found"),
    "long blocks": ({"block_length": 4096, "batch_tokens": 4096}, UsageError, "--block-length 4096 is out of range"),
    "no held-out text": ({"heldout_tokens": 0}, UsageError, "--heldout-tokens 0 leaves nothing to measure on"),
    "long warm-up": ({"router_warmup": 641}, UsageError, "--router-warmup 641 is not within the 640 tokens"),
    "quantised teacher": ({"teacher_quant": "8bit"}, ResourceError, "--teacher-quant 8bit needs a CUDA device"),
    "no tracker": ({"track": ("trackio",)}, UsageError, "--track trackio: trackio is not installed"),
    "nothing learns": (
        {"train": "router", "gate": "hard", "loss_weights": {"par": 0, "balance": 0}},
        UsageError,
        "--train router",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(checkpoint: Path, text: Path, tmp_path: Path, case: str) -> None:
    changes, kind, message = BAD[case]
    with pytest.raises(kind) as refused:
        tune(config(checkpoint, text, tmp_path / "tuned", **changes))
    assert message in str(refused.value)
    assert not (tmp_path / "tuned").exists()


def test_no_factorized_checkpoint(dense_source: DenseSource, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no factorctl\.json"):
        tune(config(dense_source(), text, tmp_path / "tuned"))
    with pytest.raises(UsageError, match=r"no checkpoint was named and .*empty holds none"):
        tune(
            dataclasses.replace(
                config(dense_source(), text, tmp_path / "x"), checkpoint=None, workspace=tmp_path / "empty"
            )
        )


def test_unreadable_data(checkpoint: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.jsonl.gz"
    damaged.write_bytes(b"no gzip at all")
    with pytest.raises(FactorctlError, match=r"damaged\.jsonl\.gz"):
        tune(config(checkpoint, damaged, tmp_path / "tuned"))


def test_an_existing_output_is_kept(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    tune(config(checkpoint, text, tmp_path / "tuned"))
    with pytest.raises(UsageError, match=r"tuned exists\nHint: .*--overwrite"):
        tune(config(checkpoint, text, tmp_path / "tuned"))
    tune(config(checkpoint, text, tmp_path / "tuned", overwrite=True, seed=1))
    assert read_manifest(tmp_path / "tuned").config["seed"] == 1


def test_a_tokenizer_of_another_model(tmp_path: Path, text: Path) -> None:
    source, other = make_source(tmp_path / "source", vocab_size=30), tmp_path / "other"
    other.mkdir()
    for path in source.glob("tokenizer*"):
        path.rename(other / path.name)
    factorize_quietly(weights_only(source, tmp_path / "base", top_k=2))
    shutil.copytree(other, tmp_path / "base", dirs_exist_ok=True)
    with pytest.raises(
        UsageError, match="does not match the model: it makes ids up to 31, the model has embeddings for 30"
    ):
        tune(config(tmp_path / "base", text, tmp_path / "tuned"))


def test_a_damaged_checkpoint(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "damaged")
    shard = sorted((tmp_path / "damaged").glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(IntegrityError, match="its manifest says"):
        tune(config(tmp_path / "damaged", text, tmp_path / "tuned"))


def test_too_little_disk_or_memory(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
        with pytest.raises(ResourceError, match=r"needs .* GB; 0\.0 GB are free"):
            tune(config(checkpoint, text, tmp_path / "tuned"))
    monkeypatch.setattr(finetune_memory, "PROCESS_BYTES", 10**15)
    with pytest.raises(ResourceError, match=r"about 1000000\.0 GB of memory are needed"):
        tune(config(checkpoint, text, tmp_path / "tuned"))


class Notebook(GeneralTracker):
    """A tracker that keeps what it is told."""

    name, requires_logging_directory, tracker = "trackio", False, None

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[int | None, dict[str, Any]]] = []

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.told.append((None, values))

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.told.append((step, values))


def test_trackers_are_told_what_the_metrics_file_is(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook, genuine = Notebook(), finetune_model.Accelerator
    monkeypatch.setattr(finetune_model.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(
        finetune_model,
        "Accelerator",
        lambda **options: genuine(**(options | {"log_with": {("trackio",): notebook}[tuple(options["log_with"])]})),
    )
    result = tune(config(checkpoint, text, tmp_path / "tuned", track=("trackio",)))
    assert notebook.told[0] == (None, {"preset": "default", "notation": "1R4E2K", "tokens": 640})
    lines = [json.loads(line) for line in Path(result.metrics).read_text().splitlines()]
    assert notebook.told[1:] == [(line.pop("step"), {k: v for k, v in line.items() if k != "tokens"}) for line in lines]
    assert {"kd", "par", "balance", "agreement", "gradient_norm", "load_busiest", "load_idlest"} <= lines[0].keys()


def command(checkpoint: Path, text: Path, out: Path, *more: str) -> list[str]:
    sizes = ["--block-length", "32", "--batch-tokens", "128", "--heldout-tokens", "128", "--device", "cpu"]
    return ["finetune", str(checkpoint), "--tokens", "640", "--data", str(text), *sizes, "--out", str(out), "-q", *more]


def test_json_from_the_command_line(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, command(checkpoint, text, tmp_path / "tuned", "--format", "json", "--loss", "z=0.001")
    )
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    keys = {"checkpoint", "parent", "tokens", "steps", "losses", "perplexity_dense", "perplexity_before"}
    keys |= {"perplexity_after", "router_agreement", "tokens_per_second", "seconds"}
    assert keys <= result.keys()
    assert result["losses"].keys() == {"lm", "kd", "par", "balance", "z"}


def test_tables_from_the_command_line(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, command(checkpoint, text, tmp_path / "tuned"))
    assert done.exit_code == 0, done.output
    for words in ("Held-out perplexity", "dense", "before", "after", "router agreement", "factorctl eval"):
        assert words in done.stdout


def test_a_plan_from_the_command_line(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, command(checkpoint, text, tmp_path / "tuned", "--dry-run"))
    assert done.exit_code == 0, done.output
    assert "640 in 5 steps of 128" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--loss", "kd"], "--loss 'kd' is no NAME=WEIGHT"),
        (["--loss", "kd=1", "--loss", "kd=2"], "--loss kd is given twice"),
        (["--track", "tensorbord"], "--track tensorbord is not known"),
        (["--save-every", "often"], "--save-every 'often' is not a number of tokens"),
    ],
)
def test_bad_options_on_the_command_line(
    checkpoint: Path, text: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    done = CliRunner().invoke(app, command(checkpoint, text, tmp_path / "tuned", *options))
    assert isinstance(done.exception, UsageError)
    assert message in str(done.exception)


@pytest.mark.slow
def test_compiled_layers_give_the_same_losses(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    plain = tune(config(checkpoint, text, tmp_path / "plain", tokens=256))
    compiled = tune(config(checkpoint, text, tmp_path / "compiled", tokens=256, compile=True))
    assert compiled.losses["kd"] == pytest.approx(plain.losses["kd"], rel=1e-3)


def test_headers_of_the_teacher_are_read_once(
    refitted: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_finetune(config(refitted, text, tmp_path / "tuned"), SilentProgress())
    assert plan.teacher is not None
    opened, read_header = list[Path](), checkpoint_reader._read_header

    def noted(path: Path) -> list[checkpoint_reader.TensorEntry]:
        opened.append(path)
        return read_header(path)

    monkeypatch.setattr(checkpoint_reader, "_read_header", noted)
    finetune_model.build_distiller(plan, SilentProgress())
    assert [path for path in opened if path.parent == plan.teacher.path] == [plan.teacher.path / "model.safetensors"]
