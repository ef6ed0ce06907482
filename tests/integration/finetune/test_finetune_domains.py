"""`finetune --routing domain`: what is trained, what a checkpoint keeps, that a resumed run makes the same choice."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DenseSource
from support.command_line import cli
from support.evaluating import run
from support.tiny import directory_bytes, factorize_quietly, some_ids, weights_only

import factorctl
from factorctl.checkpoint.reader import CheckpointReader
from factorctl.config.export import ExportConfig
from factorctl.config.finetune import FinetuneConfig
from factorctl.errors import IntegrityError, UsageError
from factorctl.models.building import factored_ffns
from factorctl.models.domains import domains_of
from factorctl.models.loading import open_checkpoint
from factorctl.pipeline.export.run import export
from factorctl.pipeline.finetune.run import finetune
from factorctl.progress import SilentProgress

pytestmark = pytest.mark.usefixtures("no_pictures", "no_collection")


@pytest.fixture(scope="module")
def parent(dense_source: DenseSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("domains") / "parent"
    factorize_quietly(weights_only(dense_source(), out, num_experts=6, top_k=2, strategy="permuted"))
    return out


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of two domains that have no letter in common."""
    draw, path = random.Random(0), tmp_path_factory.mktemp("mixed") / "mixed.jsonl"
    rows = [
        {"text": "".join(draw.choices(letters, k=60)), "domain": name}
        for _ in range(30)
        for name, letters in (("front", "abcdefgh"), ("back", "qrstuvwxyz"))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(parent: Path, text: Path, out: Path, **changes: Any) -> FinetuneConfig:
    plain = FinetuneConfig(
        tokens=640,
        checkpoint=parent,
        data=str(text),
        block_length=32,
        batch_tokens=128,
        heldout_tokens=128,
        device="cpu",
        routing="domain",
        lr=1e-2,
        weight_decay=0.0,
        out=out,
    )
    return dataclasses.replace(plain, **changes)


@pytest.fixture(scope="module")
def trained(parent: Path, mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "out"
    result = finetune(config(parent, mixed, out), SilentProgress())
    assert result.perplexity_after < result.perplexity_before
    assert "par" not in result.losses
    assert result.router_agreement is not None
    return out


def test_a_checkpoint_keeps_domains_tables_and_routers_of_zeros(trained: Path, parent: Path) -> None:
    spec = open_checkpoint(trained).spec
    assert spec.domains is not None
    assert (spec.domains.names, spec.domains.top_k) == (("back", "front"), 2)
    reader = CheckpointReader(trained)
    for layer in (0, 1):
        prefix = f"model.layers.{layer}.mlp."
        assert reader.read(f"{prefix}domain_experts").shape == (2, 2)
        assert not reader.read(f"{prefix}router").any()
        before = CheckpointReader(parent).read(f"{prefix}gate_up")
        moved_N = (reader.read(f"{prefix}gate_up") - before).flatten(1).any(1)
        used = set(reader.read(f"{prefix}domain_experts").flatten().tolist())
        assert {expert for expert in range(6) if moved_N[expert]} == used, "no other expert ever ran"


def test_half_precision_keeps_master_weights_and_chooses_with_what_computes(
    parent: Path, mixed: Path, trained: Path, tmp_path: Path
) -> None:
    result = finetune(config(parent, mixed, tmp_path / "half", precision="bfloat16"), SilentProgress())
    assert result.perplexity_after < result.perplexity_before
    tables = [CheckpointReader(path).read("model.layers.0.mlp.domain_experts") for path in (tmp_path / "half", trained)]
    assert torch.equal(*tables)


@torch.no_grad()
def test_it_loads_and_chooses_by_what_a_text_is_like(trained: Path) -> None:
    model = factorctl.load(trained)
    domains = domains_of(model)
    assert domains is not None
    front, back = torch.randint(4, 12, (1, 30)), torch.randint(20, 30, (1, 30))
    model(input_ids=torch.cat([front, back]))
    assert [domains.names[index] for index in domains.of_row_B.tolist()] == ["front", "back"]
    chosen = [ffn.route(torch.zeros(60, 32)) for ffn in factored_ffns(model)]
    assert all((routing.weights_TK == routing.weights_TK[0, 0]).all() for routing in chosen)
    dense = factorctl.load(trained, top_k=6)
    assert torch.isfinite(dense(input_ids=some_ids()).logits).all()
    with pytest.raises(UsageError, match="were chosen by domain, 2 for each, not 3"):
        factorctl.load(trained, top_k=3)
    generated = model.generate(front, max_new_tokens=4, do_sample=False)
    assert generated.shape == (1, 34)


def test_tables_that_cannot_be_are_refused_and_inspect_names_the_domains(trained: Path, tmp_path: Path) -> None:
    bad = shutil.copytree(trained, tmp_path / "bad")
    entry = CheckpointReader(bad).entry("model.layers.1.mlp.domain_experts")
    with (bad / entry.file).open("r+b") as shard:
        shard.seek(entry.start)
        shard.write((6).to_bytes(4, "little"))
    with pytest.raises(IntegrityError, match="layer 1 gives a domain the experts"):
        factorctl.load(bad, verify=False)
    assert "back, front" in cli("inspect", trained).stdout


def test_it_is_evaluated_beside_its_controls_and_is_one_itself(trained: Path, mixed: Path, tmp_path: Path) -> None:
    result = run(trained, tmp_path / "out", data=(str(mixed),), controls="all", calibration=str(mixed))
    assert set(result.domains["mixed"]) == {"back", "front"}
    assert "knowledge_factor" not in result.controls
    assert "random_routing" in result.controls


def test_a_resumed_run_makes_the_same_choice(
    parent: Path, mixed: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from factorctl.training.loop import TrainingLoop

    genuine = TrainingLoop._advance

    def failing(loop: TrainingLoop, now: Any, request: Any, task: Any) -> Any:
        if now.step == 3:
            raise KeyboardInterrupt
        return genuine(loop, now, request, task)

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(TrainingLoop, "_advance", failing)
        with pytest.raises(KeyboardInterrupt):
            finetune(config(parent, mixed, out, save_every=128), SilentProgress())
    finetune(config(parent, mixed, out, save_every=128, resume=True), SilentProgress())
    assert directory_bytes(out) == directory_bytes(trained)


def test_training_goes_on_with_the_choice_that_the_checkpoint_has(trained: Path, mixed: Path, tmp_path: Path) -> None:
    finetune(config(trained, mixed, tmp_path / "out", routing=None, tokens=128), SilentProgress())
    before, after = CheckpointReader(trained), CheckpointReader(tmp_path / "out")
    for name in before.entries:
        if name.endswith("domain_experts") or "model.domains" in name:
            assert torch.equal(before.read(name), after.read(name))


def test_the_command_tells_agreement_and_no_loss_of_routers(parent: Path, mixed: Path, tmp_path: Path) -> None:
    outcome = cli(
        "finetune", parent, "--routing", "domain", "--data", mixed, "--tokens", "128", "--block-length", "32",
        "--batch-tokens", "64", "--heldout-tokens", "64", "--device", "cpu", "--out", tmp_path / "out",
    )  # fmt: skip
    assert outcome.code == 0, outcome.stderr
    assert "router agreement" in outcome.stdout
    assert "PAR" not in outcome.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 6}, "--routing domain has nothing to choose at 1R6E6K"),
        ({"train": "router"}, "--train router has no meaning with --routing domain"),
        ({"router_refresh": 64}, "--router-refresh has no meaning with --routing domain"),
        ({"compile": True}, "--compile does not work with --routing domain"),
        ({"loss_weights": {"lm": 0.0, "kd": 0.0}}, "every loss that teaches experts has weight 0"),
    ],
)
def test_what_does_not_fit_is_refused(
    parent: Path, mixed: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        finetune(config(parent, mixed, tmp_path / "out", **changes), SilentProgress())


def test_routers_cannot_be_had_back_and_no_export_holds_it(trained: Path, mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="chooses experts by domain and has no routers"):
        finetune(config(trained, mixed, tmp_path / "out", routing="token"), SilentProgress())
    with pytest.raises(UsageError, match="which no stock engine does"):
        export(ExportConfig(checkpoint=trained, out=tmp_path / "hf"), SilentProgress())
