"""`eval` end to end: exact at K = N, true to its parts, and controls on a planted model, where the order is known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import DenseSource
from support.evaluating import SIZES, run
from support.planted import plant
from support.tiny import factorize_quietly, make_tokenizer, weights_only
from transformers import AutoConfig, AutoModelForCausalLM

import factorctl
from factorctl.config.evaluate import EvalConfig
from factorctl.data.sampling import sample_documents
from factorctl.evaluation.perplexity import TextDocument, score_text
from factorctl.models.loading import load_dense
from factorctl.pipeline.evaluate.control_models import fine_shape
from factorctl.pipeline.evaluate.controls import CONTROLS
from factorctl.pipeline.evaluate.plan import plan_evaluation, resolved_config
from factorctl.pipeline.evaluate.report import report_tables
from factorctl.progress import SilentProgress

pytestmark = pytest.mark.usefixtures("no_collection", "no_pictures")


def test_at_k_equal_n_a_checkpoint_scores_exactly_as_its_source(
    dense_source: DenseSource, text: Path, task_files: Path, tmp_path: Path
) -> None:
    factorize_quietly(weights_only(dense_source(), tmp_path / "all", top_k=4))
    result = run(
        tmp_path / "all", tmp_path / "out", data=(str(text),), tasks=("piqa", "openbookqa"), task_data=task_files,
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


def test_documents_can_be_cut_to_their_beginnings(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    result = run(checkpoint, tmp_path / "out", data=(str(text),), data_tokens=200, document_tokens=10, fidelity=False)
    found = result.perplexity["words"]
    assert (found.documents, found.tokens) == (20, 20 * 9)


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
    drawn = sample_documents(load_dense(source), make_tokenizer(), tokens=2500, document_length=64, seed=1)
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


@pytest.mark.parametrize(("asked", "taken"), [(None, 1024), (512, 512)])
def test_controls_are_calibrated_on_as_many_tokens_as_the_checkpoint(
    asked: int | None, taken: int, planted: tuple[Path, Path]
) -> None:
    made, own = planted
    config = EvalConfig(checkpoint=made, data=(str(own),), controls="fast", calibration_tokens=asked, device="cpu")
    plan = plan_evaluation(config, SilentProgress())
    assert plan.config.calibrated_on == taken
    assert resolved_config(plan)["calibration_tokens"] == taken


def test_random_and_oracle_routing_bracket_the_router(planted: tuple[Path, Path], tmp_path: Path) -> None:
    made, own = planted
    result = run(made, tmp_path / "out", data=(str(own),), controls="fast", data_tokens=2000)
    losses = {name: row.perplexity["own"] for name, row in result.controls.items()}
    model, dense = result.perplexity["own"].model, result.perplexity["own"].dense
    assert losses["random_routing"] > 1.05 * model
    assert losses["oracle_routing"] <= model * 1.001
    assert losses["oracle_routing"] >= dense * 0.999
    assert losses["all_experts"] == pytest.approx(dense, rel=1e-5)
    assert losses["static"] > model, "half the experts for everyone serve half of the words"
    assert all(layer.agreement is not None and layer.agreement > 0.6 for layer in result.fidelity)


def test_every_control_is_measured_at_the_same_active_neurons(
    refitted: Path, text: Path, task_files: Path, tmp_path: Path
) -> None:
    result = run(
        refitted, tmp_path / "out", data=(str(text),), tasks=("piqa",), task_data=task_files, limit=6, controls="all"
    )
    assert result.controls.keys() == CONTROLS.keys()
    active = result.active_ffn_fraction
    for name, row in result.controls.items():
        assert row.perplexity["words"] > 1
        assert 0 <= row.tasks["piqa"] <= 1
        assert row.task_average == row.tasks["piqa"]
        if name == "all_experts":
            assert row.active_ffn_fraction == 1.0
        elif not name.startswith("ffn_skip"):  # two layers, and both always run
            assert row.active_ffn_fraction == pytest.approx(active)
    assert result.tasks["piqa"]["n"] == 6


def test_static_pruning_is_what_factorize_makes_at_top_k_0(
    refitted: Path, dense_source: DenseSource, text_file: Path, text: Path, tmp_path: Path
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
                calibration=str(text_file),  # which `refitted` was calibrated on
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


def test_perplexity_by_domain_is_that_of_its_documents_alone(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    rows = [json.loads(line)["text"] for line in text.read_text().splitlines()][:12]
    path = tmp_path / "mixed.jsonl"
    named = [{"text": row, "domain": ("code", "wiki")[index % 2]} for index, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in named))
    only = f"{path}:domain=code"
    result = run(checkpoint, tmp_path / "out", data=(str(path), only), data_tokens=100_000, fidelity=False)
    assert set(result.domains) == {"mixed", "mixed:domain=code"}
    whole, mixed = result.perplexity["mixed"], result.domains["mixed"]
    assert list(mixed) == ["code", "wiki"]
    assert mixed["code"] == result.perplexity["mixed:domain=code"]
    assert mixed["code"].tokens + mixed["wiki"].tokens == whole.tokens
    nats = sum(found.tokens * math.log(found.model) for found in mixed.values())
    assert nats / whole.tokens == pytest.approx(math.log(whole.model))
    assert result.dense.domains["mixed"]["wiki"] == mixed["wiki"].dense
    table = next(table for table in report_tables(result) if table.title == "Perplexity by domain")
    assert [row[0] for row in table.rows] == ["mixed, code", "mixed, wiki", "mixed:domain=code, code"]
